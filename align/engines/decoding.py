"""A prompt encoded once in, many branches grown token by token behind it out.

A row of the batch is one question with all its branches. A step feeds one token a branch, `(rows, slots)`; what a slot
sees of the row's keys is kept as a mask that grows by the step's own columns. So the prompt's keys exist once whatever
the number of branches, and memory is P + K*R tokens a question. Branches that have ended leave the batch whenever
enough of them have: the keys that nobody sees any more are dropped, and the row with them when it was the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from align.prefix.attention import AttentionPlan, active_layout
from align.prefix.log_probs import head_of, require_every_layer
from align.prefix.rows import backbone_of
from align.prefix.token_stats import final_logits

# Buffers of keys grow by this many tokens a row.
CAPACITY_STEP = 256
# Drop ended branches when fewer than this part of the slots is alive: each drop copies the keys that remain.
COMPACT_BELOW = 0.7


class PreallocatedLayer(DynamicLayer):
    """A cache layer with room to grow: appending copies the new keys only, not the whole cache."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self.capacity is None or self.capacity[0].shape[-2] < stop:
            old = (self.keys, self.values) if start else None
            self.capacity = (_with_capacity(key_states, stop), _with_capacity(value_states, stop))
            if old is not None:
                self.capacity[0][:, :, :start], self.capacity[1][:, :, :start] = old
        self.capacity[0][:, :, start:stop] = key_states
        self.capacity[1][:, :, start:stop] = value_states
        return self._show(stop)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        """The filled part of the room becomes the layer's keys and values."""
        assert self.capacity is not None
        self.dtype, self.device, self.is_initialized = self.capacity[0].dtype, self.capacity[0].device, True
        self.keys, self.values = self.capacity[0][:, :, :length], self.capacity[1][:, :, :length]
        return self.keys, self.values

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        """Keep these rows `(B',)` and, of each, these key columns `(B', L')`."""
        length = columns.shape[1]

        def take(old: Tensor) -> Tensor:
            kept = old[rows[:, None], :, columns].transpose(1, 2)
            capacity = _with_capacity(kept, length)
            capacity[:, :, :length] = kept
            return capacity

        assert self.keys is not None
        assert self.values is not None
        self.capacity = (take(self.keys), take(self.values))
        self._show(length)


def _with_capacity(states: Tensor, length: int) -> Tensor:
    """Uninitialised states like these for `length` tokens and some more."""
    return states.new_empty(*states.shape[:2], length + CAPACITY_STEP, states.shape[3])


def preallocated_cache() -> Cache:
    """An empty cache whose layers have room to grow."""
    return Cache(layer_class_to_replicate=PreallocatedLayer)


@dataclass
class Branches:
    """The branches of a batch before their first new token.

    `visible` `(B, K, L)` bool: what each branch sees of the L keys in `cache`. `position` `(B, K)` int64: position of
    its first new token. `hidden` `(B, K, H)`: the state that predicts it. `alive` `(B, K)` bool: False on slots that
    only fill up a row with fewer branches.
    """

    cache: Cache
    visible: Tensor
    position: Tensor
    hidden: Tensor
    alive: Tensor


@dataclass
class DecodeOutput:
    """What grew: `tokens[b][k]` with the end token if it came, whether it came, and the tokens' log-probabilities
    under the unfiltered distribution (empty unless asked for)."""

    tokens: list[list[list[int]]]
    stopped: list[list[bool]]
    log_probs: list[list[list[float]]] = field(default_factory=list)


# Gets logits (N, V), and for each the row and branch it belongs to (N,), and the step; gives tokens (N,).
Sampler = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@torch.no_grad()
def prefill(model: PreTrainedModel, inputs: dict[str, Any], positions: Tensor) -> tuple[Cache, Tensor]:
    """Encode right-padded prompts once: their cache, and `(B, P, H)` hidden states.

    `positions` `(B, P)` or `(axes, B, P)`. The model must have been given to `use_shared_prefix`.
    """
    cache = preallocated_cache()
    with active_layout(AttentionPlan(inputs["input_ids"].shape[1], None)) as plan:
        output = backbone_of(model)(
            **{**inputs, "position_ids": positions}, past_key_values=cache, use_cache=True, return_dict=True
        )
    require_every_layer(model, plan.num_calls)
    return cache, output.last_hidden_state


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    branches: Branches,
    choose: Sampler,
    *,
    max_new_tokens: int,
    eos_token_ids: list[int],
    num_position_axes: int | None = None,
    with_log_probs: bool = False,
    on_row: Callable[[int, list[list[int]], list[bool]], None] | None = None,
) -> DecodeOutput:
    """Grow every branch until its end token, or `max_new_tokens`.

    `on_row(b, tokens, stopped)` is called as soon as all branches of a row have ended. `num_position_axes` is that of
    models with several position axes.
    """
    state = _State(branches, max_new_tokens, with_log_probs)
    head = head_of(model)
    backbone = backbone_of(model)
    end = torch.tensor(eos_token_ids, device=branches.hidden.device)
    hidden = branches.hidden
    for step in range(max_new_tokens):
        logits, _ = final_logits(hidden.flatten(0, 1), head.weight, head.bias, head.softcap, head.logit_scale)
        tokens = choose(logits, state.row.repeat_interleave(state.num_slots), state.branch.flatten(), step)
        log_probs = None
        if with_log_probs:
            log_probs = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).view(state.alive.shape)
        tokens = tokens.view(state.alive.shape)
        finished = state.record(step, tokens, torch.isin(tokens, end), log_probs)
        if on_row is not None:
            for b in finished:
                on_row(b, *state.result_of(b))
        if not state.any_alive() or step + 1 == max_new_tokens:
            break
        kept = state.compact()
        tokens = tokens if kept is None else tokens[kept[0]].gather(1, kept[1])
        positions = state.next_positions(step)
        with active_layout(AttentionPlan(0, state.extend_mask())):
            hidden = backbone(
                input_ids=tokens,
                position_ids=positions
                if num_position_axes is None
                else positions.expand(num_position_axes, *positions.shape),
                past_key_values=state.cache,
                use_cache=True,
                return_dict=True,
            ).last_hidden_state
    decoded = state.result()
    if on_row is not None:
        for b in state.unfinished:
            on_row(b, decoded.tokens[b], decoded.stopped[b])
    return decoded


class _State:
    """Which slots are alive, what they see, and what they have said.

    Slots move when the batch is compacted; `row` `(B',)` and `branch` `(B', K')` say which question and branch a slot
    belongs to. What was said is kept on the device, `(B, K, max_new_tokens)`, until a row is finished.
    """

    def __init__(self, branches: Branches, max_new_tokens: int, with_log_probs: bool) -> None:
        device = branches.hidden.device
        batch, slots = branches.alive.shape
        self.cache = branches.cache
        self.visible = branches.visible
        self.position = branches.position
        self.alive = branches.alive.clone()
        self.exists = branches.alive
        self.row = torch.arange(batch, device=device)
        self.branch = torch.arange(slots, device=device).expand(batch, slots)
        self.generated_ids = torch.zeros(batch, slots, max_new_tokens, dtype=torch.int64, device=device)
        self.generated_log_probs = torch.zeros(batch, slots, max_new_tokens, device=device) if with_log_probs else None
        self.length = torch.zeros(batch, slots, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(batch, slots, dtype=torch.bool, device=device)
        self.unfinished = list(range(batch))
        self._alive_host = self.alive.cpu()

    @property
    def num_slots(self) -> int:
        return self.alive.shape[1]

    def any_alive(self) -> bool:
        return bool(self._alive_host.any())

    def record(self, step: int, tokens: Tensor, ends: Tensor, log_probs: Tensor | None) -> list[int]:
        """Note a step's tokens of the living; returns the questions of which the last branch has just ended."""
        # Every slot writes, also those that have ended: what stands behind `length` is never read.
        at = (self.row[:, None], self.branch)
        self.generated_ids[(*at, step)] = tokens
        if self.generated_log_probs is not None and log_probs is not None:
            self.generated_log_probs[(*at, step)] = log_probs
        self.length[at] += self.alive
        self.stopped[at] |= self.alive & ends
        self.alive = self.alive & ~ends
        before, self._alive_host = self._alive_host.any(dim=1), self.alive.cpu()
        over = before & ~self._alive_host.any(dim=1)
        finished = self.row.cpu()[over].tolist() if bool(over.any()) else []
        self.unfinished = [b for b in self.unfinished if b not in finished]
        return finished

    def compact(self) -> tuple[Tensor, Tensor] | None:
        """Drop what has ended when it is worth the copy: the kept rows `(B',)` and slots `(B', K')`, or None."""
        alive = self._alive_host
        counts = alive.sum(dim=1)
        width = int(counts.max())
        if int((counts > 0).sum()) * width > COMPACT_BELOW * alive.numel():
            return None
        device = self.alive.device
        rows = (counts > 0).nonzero()[:, 0]
        # Living slots first; a row with fewer of them than the widest keeps an ended one as a filler.
        slots = (~alive[rows]).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        rows, slots = rows.to(device), slots.to(device)
        self.alive = self.alive[rows].gather(1, slots)
        self.branch = self.branch[rows].gather(1, slots)
        self.position = self.position[rows].gather(1, slots)
        self.row = self.row[rows]
        visible = self.visible[rows].gather(1, slots[:, :, None].expand(-1, -1, self.visible.shape[2]))
        needed = (visible & self.alive[:, :, None]).any(dim=1)
        columns = (~needed).to(torch.int8).argsort(dim=1, stable=True)[:, : int(needed.sum(dim=1).max())]
        visible = visible.gather(2, columns[:, None].expand(-1, visible.shape[1], -1))
        self.visible = visible & needed.gather(1, columns)[:, None]
        # A filler, and a column that only fills up, must not leave a slot without anything to see.
        self.visible |= ~self.visible.any(dim=2, keepdim=True)
        for layer in self.cache.layers:
            layer.keep(rows, columns)
        self._alive_host = self.alive.cpu()
        return rows, slots

    def next_positions(self, step: int) -> Tensor:
        """`(B', K')` positions of the tokens said in this step."""
        return self.position + step

    def extend_mask(self) -> Tensor:
        """Add this step's columns, of which each slot sees its own: the mask `(B', 1, K', L + K')`."""
        own = torch.eye(self.num_slots, dtype=torch.bool, device=self.visible.device)
        self.visible = torch.cat([self.visible, own.expand(len(self.visible), -1, -1)], dim=2)
        return self.visible[:, None]

    def result_of(self, b: int) -> tuple[list[list[int]], list[bool]]:
        """Tokens and ends of the branches of one question."""
        branches = self.exists[b].nonzero()[:, 0].tolist()
        generated_ids, length, stopped = (
            self.generated_ids[b].tolist(),
            self.length[b].tolist(),
            self.stopped[b].tolist(),
        )
        return [generated_ids[k][: length[k]] for k in branches], [stopped[k] for k in branches]

    def result(self) -> DecodeOutput:
        results = [self.result_of(b) for b in range(len(self.generated_ids))]
        log_probs = []
        if self.generated_log_probs is not None:
            values = self.generated_log_probs.tolist()
            for b, (tokens, _) in enumerate(results):
                branches = self.exists[b].nonzero()[:, 0].tolist()
                log_probs.append(
                    [values[b][k][: len(generated_ids)] for k, generated_ids in zip(branches, tokens, strict=True)]
                )
        return DecodeOutput([tokens for tokens, _ in results], [stopped for _, stopped in results], log_probs)
