"""A model in this process as an engine: one vision pass and one prefill a question, however much is asked of it.

Sampling grows all samples of a question behind its one encoded prompt; asks put all branches of a comparison behind it.
Both are proved on the first real batch against separate full sequences; where they disagree, or the architecture does
not allow a shared prefix, the plain path (`align.engines.plain`) is used instead and `notes` say why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.engines.base import SampleRequest, SampleResult, SamplingSettings
from align.engines.budget import Budget, is_out_of_memory
from align.engines.decoding import Branches, Chooser, Grown, grow, prefill
from align.engines.plain import plain_ask_generate, plain_ask_log_probs, plain_sample
from align.engines.prompts import AskTree, Prompter, to_device
from align.engines.sampling import choose, penalise_repetition, uniforms
from align.errors import UserError
from align.prefix.attention import AttentionPlan, active_layout, stop_shared_prefix, use_shared_prefix
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import head_of, plain_segments, row_hidden_states
from align.prefix.proof import Proof, compare, failed, prove, tolerance_for
from align.prefix.rows import backbone_of, placeholder_ids, prompt_positions_of
from align.prefix.token_stats import token_stats
from reward.ask import Ask

# What the first batch is proved on: this many items, and so many tokens of each branch.
PROOF_ITEMS = 2
PROOF_TOKENS = 64
PROOF_BRANCHES = 4


class LocalEngine:
    """`Engine` with a loaded model.

    `open_image` opens an image handle. `shared_prefix`: `auto` uses it where the first batch proves it exact, `on` raises
    UserError where it is not, `off` never does. `batch_size` is in questions; None finds it by itself.
    `fallback_reason` is None as long as the shared prefix is used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        open_image: Callable[[Any], Any] = lambda image: image,
        shared_prefix: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.prompter = Prompter(processor, open_image)
        self.shared_prefix = shared_prefix
        self.budget = Budget(model, batch_size)
        self.notes: dict[str, str] = {}
        self.fallback_reason: str | None = None
        self._proved: set[str] = set()
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.eos_token_ids = _eos_token_ids(model, self.prompter.tokenizer)
        if shared_prefix == "off":
            self._fall_back("switched off (shared_prefix: off)")

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        on_result: Callable[[SampleResult], None],
    ) -> None:
        """Answer all requests; `on_result` is called once a question, as soon as its last sample has ended."""

        def run(batch: list[SampleRequest]) -> int:
            if self.fallback_reason is None:
                tokens = self._sample_shared(batch, settings, keep)
                if tokens is not None:
                    return tokens
            return max(self._sample_plain(request, settings, keep) for request in batch)

        def keep(request: SampleRequest, tokens: list[list[int]], stopped: list[bool]) -> None:
            waiting.remove(request.id)
            on_result(self._result(request, tokens, stopped))

        waiting = {request.id for request in requests}
        assert len(waiting) == len(requests), "two requests have the same id"
        self._in_batches(
            list(requests), run, proof="grow", alike=lambda r: (bool(r.images), r.num_samples), waiting=waiting
        )

    def log_probs(self, asks: Sequence[Ask]) -> list[Any]:
        """Per ask `(num_branches, num_options)` float64: log-probability of each option as the answer's beginning."""
        results: dict[int, np.ndarray] = {}

        def run(batch: list[int]) -> int:
            trees = [self.prompter.tree_of(asks[i]) for i in batch]
            images = [asks[i].images for i in batch]
            inputs = self._encode([tree.prompt for tree in trees], images)
            if self._rows_are_proved(inputs, trees):
                values = self._ask_log_probs_shared(inputs, trees)
            else:
                values = plain_ask_log_probs(self.model, self._encode, trees, images)
            results.update(zip(batch, values, strict=True))
            return inputs["input_ids"].shape[1] + max(_num_tokens(tree) for tree in trees)

        self._in_batches(list(range(len(asks))), run, proof="rows", alike=lambda i: bool(asks[i].images), waiting=None)
        return [results[i] for i in range(len(asks))]

    def generate(self, asks: Sequence[Ask], *, max_new_tokens: int) -> list[list[str | None]]:
        """Per ask and branch the greedy answer."""
        results: dict[int, list[str | None]] = {}

        def run(batch: list[int]) -> int:
            trees = [self.prompter.tree_of(asks[i]) for i in batch]
            images = [asks[i].images for i in batch]
            inputs = self._encode([tree.prompt for tree in trees], images)
            if self._rows_are_proved(inputs, trees):
                tokens = self._ask_generate_shared(inputs, trees, max_new_tokens)
            else:
                tokens = plain_ask_generate(
                    self.model, self._encode, trees, images, max_new_tokens=max_new_tokens, eos=self.eos_token_ids
                )
            for i, branches in zip(batch, tokens, strict=True):
                results[i] = [self._text(branch) for branch in branches]
            room = max(len(tree.leaves) for tree in trees) * max_new_tokens
            return inputs["input_ids"].shape[1] + max(_num_tokens(tree) for tree in trees) + room

        self._in_batches(list(range(len(asks))), run, proof="rows", alike=lambda i: bool(asks[i].images), waiting=None)
        return [results[i] for i in range(len(asks))]

    def _in_batches(
        self,
        items: list[Any],
        run: Callable[[list[Any]], int],
        *,
        proof: str,
        alike: Callable[[Any], Any],
        waiting: set[str] | None,
    ) -> None:
        """Run the items in batches of equal `alike`, smaller ones after running out of memory.

        `run` returns how many tokens its largest item had. `waiting` holds the ids of requests without a result yet:
        when a batch has to be repeated, those that have one are left out.
        """
        tokens = 0
        while items:
            count = self.budget.num_items(tokens) if tokens else min(PROOF_ITEMS, self.budget.num_items(1))
            if self.fallback_reason is None and proof not in self._proved:
                count = min(count, PROOF_ITEMS)
            batch = [item for item in items[:count] if alike(item) == alike(items[0])]
            try:
                tokens = max(tokens, run(batch))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.budget.retreat(len(batch))
                self.notes["out_of_memory"] = f"{self.budget.num_retreats} times; the batch was halved each time"
                if waiting is not None:
                    items = [item for item in items if item.id in waiting]
                continue
            done = {id(item) for item in batch} if waiting is not None else set(batch)
            items = [item for item in items if (id(item) if waiting is not None else item) not in done]

    def _encode(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        return to_device(self.prompter.encode(texts, images), self.device, self.dtype)

    def _sample_shared(
        self, batch: list[SampleRequest], settings: SamplingSettings, keep: Callable[..., None]
    ) -> int | None:
        """Sample a batch behind shared prompts; None when the proof failed and nothing was kept."""
        proving = "grow" not in self._proved
        texts = [self.prompter.render(request.messages) for request in batch]
        inputs = self._encode(texts, [request.images for request in batch])
        num_samples = batch[0].num_samples
        tokens_of_item = inputs["input_ids"].shape[1] + num_samples * settings.max_new_tokens
        chooser = self._chooser(inputs["input_ids"], [request.seed for request in batch], num_samples, settings)
        on_row = None if proving else lambda b, tokens, stopped: keep(batch[b], tokens, stopped)
        try:
            use_shared_prefix(self.model)
            grown = self._grow_behind(inputs, num_samples, chooser, settings.max_new_tokens, on_row, proving)
        except Exception as error:
            if not proving or is_out_of_memory(error):
                raise
            self._decide("grow", failed(error, tolerance_for(self.model)))
            return None
        if proving:
            self._decide("grow", self._prove_growth(inputs, grown))
            if self.fallback_reason is not None:
                return None
            for request, tokens, stopped in zip(batch, grown.tokens, grown.stopped, strict=True):
                keep(request, tokens, stopped)
        return tokens_of_item

    def _grow_behind(
        self,
        inputs: dict[str, Any],
        num_samples: int,
        chooser: Chooser,
        max_new_tokens: int,
        on_row: Callable[[int, list[list[int]], list[bool]], None] | None,
        with_log_probs: bool,
    ) -> Grown:
        mask = inputs["attention_mask"].bool()
        positions, start = prompt_positions_of(self.model, inputs, mask)
        cache, hidden = prefill(self.model, inputs, positions)
        last = mask.sum(dim=1) - 1
        rows = torch.arange(len(mask), device=mask.device)
        shape = (len(mask), num_samples)
        branches = Branches(
            cache=cache,
            visible=mask[:, None].expand(-1, num_samples, -1),
            position=start[:, None].expand(shape),
            hidden=hidden[rows, last][:, None].expand(-1, num_samples, -1),
            alive=torch.ones(shape, dtype=torch.bool, device=mask.device),
        )
        return grow(
            self.model,
            branches,
            chooser,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            num_position_axes=len(positions) if positions.ndim == 3 else None,
            with_log_probs=with_log_probs,
            on_row=on_row,
        )

    def _chooser(
        self, prompt_ids: Tensor, seeds: Sequence[int], num_samples: int, settings: SamplingSettings
    ) -> Chooser:
        return SeededChooser(
            settings,
            uniforms(seeds, num_samples, settings.max_new_tokens).to(prompt_ids.device),
            prompt_ids,
        )

    def _sample_plain(self, request: SampleRequest, settings: SamplingSettings, keep: Callable[..., None]) -> int:
        inputs = self._encode([self.prompter.render(request.messages)], [request.images])
        chooser = self._chooser(inputs["input_ids"], [request.seed], request.num_samples, settings)
        tokens, stopped = plain_sample(
            self.model,
            inputs,
            chooser,
            num_samples=request.num_samples,
            max_new_tokens=settings.max_new_tokens,
            eos=self.eos_token_ids,
        )
        keep(request, tokens, stopped)
        return request.num_samples * (inputs["input_ids"].shape[1] + settings.max_new_tokens)

    def _result(self, request: SampleRequest, tokens: list[list[int]], stopped: list[bool]) -> SampleResult:
        return SampleResult(
            id=request.id,
            texts=tuple(self._text(branch) for branch in tokens),
            num_tokens=tuple(len(branch) for branch in tokens),
            finish_reasons=tuple("stop" if ended else "length" for ended in stopped),
        )

    def _text(self, tokens: list[int]) -> str:
        return self.prompter.tokenizer.decode(tokens, skip_special_tokens=True)

    @torch.no_grad()
    def _ask_log_probs_shared(self, inputs: dict[str, Any], trees: list[AskTree]) -> list[np.ndarray]:
        rows, reads = [], []
        for b, tree in enumerate(trees):
            row = list(tree.segments)
            for leaf in tree.leaves:
                for option in tree.options:
                    # All but an option's last token are read on; the last is only predicted.
                    segment = leaf
                    if len(option) > 1:
                        segment = len(row)
                        row.append(Segment(option[:-1], leaf))
                    reads.append((b, leaf, segment, option))
            rows.append(row)
        layout = Layout.build(inputs["attention_mask"], rows, pad_token_id=0)
        hidden = row_hidden_states(self.model, inputs, layout)
        last = layout.last.tolist()
        at: list[tuple[int, int, int]] = []
        for b, leaf, segment, option in reads:
            before = last[b][segment] - (len(option) - 2)
            at += [(b, last[b][leaf] if j == 0 else before + j - 1, token) for j, token in enumerate(option)]
        where = torch.tensor(at, device=hidden.device)
        head = head_of(self.model)
        values = token_stats(
            hidden[where[:, 0], where[:, 1]],
            head.weight,
            head.bias,
            where[:, 2],
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        ).log_probs.tolist()
        results, start = [], 0
        for tree in trees:
            table = np.empty((len(tree.leaves), len(tree.options)))
            for branch in range(len(tree.leaves)):
                for o, option in enumerate(tree.options):
                    table[branch, o] = sum(values[start : start + len(option)])
                    start += len(option)
            results.append(table)
        return results

    @torch.no_grad()
    def _ask_generate_shared(
        self, inputs: dict[str, Any], trees: list[AskTree], max_new_tokens: int
    ) -> list[list[list[int]]]:
        layout = Layout.build(inputs["attention_mask"], [tree.segments for tree in trees], pad_token_id=0)
        positions, start = prompt_positions_of(self.model, inputs, layout.prompt_mask)
        axes = len(positions) if positions.ndim == 3 else None
        cache, _ = prefill(self.model, inputs, positions)
        segment_positions = start[:, None] + layout.depth_position
        mask = layout.mask()
        with active_layout(AttentionPlan(0, mask)):
            hidden = backbone_of(self.model)(
                input_ids=layout.input_ids,
                position_ids=segment_positions if axes is None else segment_positions.expand(axes, -1, -1),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            ).last_hidden_state
        slots = max(len(tree.leaves) for tree in trees)
        leaves = torch.tensor([tree.leaves + tree.leaves[:1] * (slots - len(tree.leaves)) for tree in trees])
        alive = torch.tensor([[k < len(tree.leaves) for k in range(slots)] for tree in trees])
        leaves, alive = leaves.to(hidden.device), alive.to(hidden.device)
        ends = layout.last.gather(1, leaves) - layout.prompt_mask.shape[1]
        assert bool((ends >= 0).all()), "a leaf has at least the template's rest"
        rows = torch.arange(len(trees), device=hidden.device)[:, None]
        branches = Branches(
            cache=cache,
            visible=mask[:, 0][rows, ends],
            position=segment_positions.gather(1, ends) + 1,
            hidden=hidden[rows, ends],
            alive=alive,
        )
        return grow(
            self.model,
            branches,
            lambda logits, *_: logits.argmax(dim=-1),
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            num_position_axes=axes,
        ).tokens

    def _rows_are_proved(self, inputs: dict[str, Any], trees: list[AskTree]) -> bool:
        """Whether whole rows may be used; the first time it is asked, a part of this batch decides."""
        if self.fallback_reason is None and "rows" not in self._proved:
            rows = []
            for tree in trees:
                wanted: set[int] = set()
                for leaf in tree.leaves[:PROOF_BRANCHES]:
                    node: int | None = leaf
                    while node is not None:
                        wanted.add(node)
                        node = tree.segments[node].parent
                order = {old: new for new, old in enumerate(sorted(wanted))}
                rows.append(
                    [
                        Segment(s.token_ids, None if s.parent is None else order[s.parent])
                        for s in (tree.segments[i] for i in order)
                    ]
                )
            layout = Layout.build(inputs["attention_mask"], rows, pad_token_id=0)
            self._decide("rows", prove(self.model, inputs, layout))
        return self.fallback_reason is None

    def _prove_growth(self, inputs: dict[str, Any], grown: Grown) -> Proof:
        """Compare the log-probabilities found while growing with those of the same samples as full sequences."""
        stop_tokens = placeholder_ids(self.model)
        rows, shared = [], []
        for tokens, log_probs in zip(grown.tokens, grown.log_probs, strict=True):
            row = []
            for said, values in zip(tokens, log_probs, strict=True):
                # A sampled image placeholder would be taken for an image when fed in together with one.
                length = next((i for i, token in enumerate(said) if token in stop_tokens), len(said))
                length = min(length, PROOF_TOKENS)
                row.append(Segment(said[:length]))
                shared += values[:length]
            rows.append(row)
        layout = Layout.build(inputs["attention_mask"], rows, pad_token_id=0)
        tolerance = tolerance_for(self.model)
        try:
            with torch.no_grad():
                plain = plain_segments(self.model, inputs, layout).log_probs
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return failed(error, tolerance)
        return compare(torch.tensor(shared), plain[layout.is_token].cpu(), tolerance)

    def _decide(self, what: str, proof: Proof) -> None:
        if proof.exact:
            self._proved.add(what)
            self.notes["shared_prefix"] = proof.reason
            return
        if self.shared_prefix == "on":
            raise UserError(
                f"shared_prefix is on, but the shared prefix cannot be used with this model: {proof.reason}",
                fix="set shared_prefix to auto, or off",
            )
        self._fall_back(proof.reason)

    def _fall_back(self, reason: str) -> None:
        self.fallback_reason = reason
        self.notes["shared_prefix"] = f"not used, every sample and branch is a full sequence: {reason}"
        stop_shared_prefix(self.model)


class SeededChooser:
    """Chooses tokens by each branch's own numbers; knows what a branch has said, where repetition is penalised.

    `numbers` `(B, K, steps)`, `prompt_ids` `(B, P)`.
    """

    def __init__(self, settings: SamplingSettings, numbers: Tensor, prompt_ids: Tensor) -> None:
        self.settings = settings
        self.numbers = numbers
        self.prompt_ids = prompt_ids
        self.seen: Tensor | None = None

    def __call__(self, logits: Tensor, row: Tensor, branch: Tensor, step: int) -> Tensor:
        """Tokens `(N,)` for logits `(N, V)` of these rows and branches `(N,)`."""
        if self.settings.repetition_penalty != 1.0:
            if self.seen is None:
                said = logits.new_zeros(len(self.prompt_ids), logits.shape[-1], dtype=torch.bool)
                said.scatter_(1, self.prompt_ids, True)
                self.seen = said[:, None].repeat(1, self.numbers.shape[1], 1)
            logits = penalise_repetition(logits, self.seen[row, branch], self.settings.repetition_penalty)
        tokens = choose(logits, self.settings, self.numbers[row, branch, step])
        if self.seen is not None:
            self.seen[row, branch, tokens] = True
        return tokens


def _num_tokens(tree: AskTree) -> int:
    return sum(len(segment.token_ids) for segment in tree.segments)


def _eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """What ends a response: the generation config's end tokens, else the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)
