"""Prompts encoded once in, the branches behind them decoded token by token out: continuous batching.

A question has a row of the cache, which all its branches see: the prompt's keys exist once whatever the number of
branches. A step feeds one token per living branch, `(1, N)`. A branch that ends leaves at once, and its columns go to
the others of its row; a question whose last branch has ended leaves its row to the next one. The host waits once per
step: for the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.engines.kv_cache import PromptPlacement, RowCache, TokenPlacement, to_device
from align.engines.sampling import Sampler, not_finite
from align.prefix.attention import AttentionPlan, active_layout
from align.prefix.log_probs import head_of, require_every_layer
from align.prefix.plans import BranchPlan
from align.prefix.rows import backbone_of, prompt_positions_of
from align.prefix.token_stats import final_logits

# The attention looks at a multiple of so many keys: kernels are chosen, and cuDNN's graphs built, per length.
KEYS_STEP = 64
# Rows move together when fewer than this part of them has a question: the attention computes all up to the last.
DENSE_ENOUGH = 0.7


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts of `rows` of a cache: their `mask` `(n, P)` bool, the position behind each `(n,)`, their number
    of position axes (None: one, left out), and the state of each one's last token `(n, H)`."""

    rows: list[int]
    mask: Tensor
    next_position: Tensor
    num_axes: int | None
    hidden: Tensor


@torch.no_grad()
def prefill(model: PreTrainedModel, inputs: dict[str, Any], cache: RowCache, rows: Sequence[int]) -> Prompts:
    """Encode right-padded prompts once, into rows of the cache.
    The model must have been given to `use_shared_prefix`."""
    mask = inputs["attention_mask"].bool()
    positions, next_position = prompt_positions_of(model, inputs, mask)
    width = mask.shape[1]
    cache.reserve(max(rows) + 1, width)
    cache.placement = PromptPlacement(to_device(rows, mask.device), width)
    last = (mask.sum(dim=1) - 1)[:, None]
    with active_layout(AttentionPlan(width, None, last)) as plan:
        output = backbone_of(model)(
            **{**inputs, "position_ids": positions}, past_key_values=cache, use_cache=True, return_dict=True
        )
    require_every_layer(model, plan.num_calls)
    hidden = output.last_hidden_state
    at = torch.arange(len(mask), device=hidden.device)
    num_axes = len(positions) if positions.ndim == 3 else None
    return Prompts(list(rows), mask, next_position, num_axes, hidden[at, last[:, 0].to(hidden.device)])


@dataclass(frozen=True)
class Branches:
    """Branches before their first new token, of questions in `rows` of the cache.

    `visible` `(n, K, L)` bool: what each branch sees of the first L keys of its row. `position` `(n, K)` int64: of its
    first new token. `hidden` `(n, K, H)`: the state that predicts it. `counts`: how many of the K each question has.
    """

    rows: list[int]
    visible: Tensor
    position: Tensor
    hidden: Tensor
    counts: list[int]
    num_axes: int | None = None

    @classmethod
    def behind(cls, prompts: Prompts, counts: Sequence[int]) -> Branches:
        """So many branches right behind each prompt."""
        most = max(counts)
        return cls(
            rows=prompts.rows,
            visible=prompts.mask[:, None].expand(-1, most, -1),
            position=prompts.next_position[:, None].expand(-1, most),
            hidden=prompts.hidden[:, None].expand(-1, most, -1),
            counts=list(counts),
            num_axes=prompts.num_axes,
        )


@dataclass
class Decoded:
    """What a question's branches became: `tokens[k]` with the end token if it came, whether it came, and the tokens'
    log-probabilities under the unfiltered distribution (empty unless asked for)."""

    ticket: int
    tokens: list[list[int]]
    stopped: list[bool]
    log_probs: list[list[float]]

    @property
    def samples(self) -> tuple[int, list[list[int]], list[bool]]:
        """The ticket, the tokens, and whether each branch ended by itself."""
        return self.ticket, self.tokens, self.stopped


@dataclass
class _Branch:
    """A branch. `lane`: its place among the living of its row."""

    row: int
    lane: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    stopped: bool = False


@dataclass
class _Question:
    """A row in use: `num_columns` of it have been given out, of which `free` ones are nobody's any more.

    `prompt`: what each branch sees at first `(L,)`, the position of its first new token `()` and the state that
    predicts it `(H,)`; kept where more branches may be wanted.
    """

    ticket: int
    row: int
    branches: list[_Branch]
    num_columns: int
    num_living: int
    prompt: tuple[Tensor, Tensor, Tensor] | None = None
    free: list[int] = field(default_factory=list)


class Decoder:
    """Decodes the branches of whatever questions are added to it, a token each per step.

    A question has a `ticket`, which the sampler hears as its number: the lowest that is not in use. `more` gets the
    ticket, the tokens and whether each branch ended by itself once the last one of a question has, and says how many
    branches it wants further behind the same prompt, which is still encoded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: Sampler,
        *,
        max_new_tokens: int,
        eos: Sequence[int],
        with_log_probs: bool = False,
        more: Callable[[int, list[list[int]], list[bool]], int] | None = None,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.max_new_tokens = max_new_tokens
        self.eos = frozenset(eos)
        self.with_log_probs = with_log_probs
        self.more = more
        self.cache = RowCache()
        self._head = head_of(model)
        self._questions: dict[int, _Question] = {}
        self._living: list[_Branch] = []
        self._num_axes: int | None = None
        # (R, K, C): what every lane sees of its row; (N,): positions of first new tokens; (N, H):
        # what predicts the next.
        self._visible = torch.zeros(0, 0, 0, dtype=torch.bool)
        self._position = torch.zeros(0, dtype=torch.int64)
        self._hidden = torch.zeros(0, 0)
        self._places: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_questions(self) -> int:
        """Questions of which a branch still lives."""
        return len(self._questions)

    @property
    def num_branches(self) -> int:
        """Branches that still live."""
        return len(self._living)

    def free_rows(self, count: int) -> list[int]:
        """The lowest rows that no question has."""
        return [row for row in range(len(self._questions) + count) if row not in self._questions][:count]

    def free_tickets(self, count: int) -> list[int]:
        """The lowest numbers that no question has."""
        taken = {question.ticket for question in self._questions.values()}
        return [ticket for ticket in range(len(taken) + count) if ticket not in taken][:count]

    def add(self, branches: Branches) -> list[int]:
        """Take in questions whose prompts (and segments) are in the cache; returns their tickets."""
        _, num_lanes, width = branches.visible.shape
        device = branches.hidden.device
        self._reserve(max(branches.rows) + 1, num_lanes, width, branches.visible.device)
        rows = to_device(branches.rows, branches.visible.device)
        self._visible[rows] = False
        self._visible[rows, :num_lanes, :width] = branches.visible
        tickets = self.free_tickets(len(branches.rows))
        taken = []
        for i, (row, count, ticket) in enumerate(zip(branches.rows, branches.counts, tickets, strict=True)):
            new = [_Branch(row, lane) for lane in range(count)]
            prompt = None
            if self.more is not None:
                prompt = branches.visible[i, 0], branches.position[i, 0], branches.hidden[i, 0]
            self._questions[row] = _Question(ticket, row, new, width, count, prompt)
            self._living += new
            taken += [i * num_lanes + lane for lane in range(count)]
        at = to_device(taken, device)
        hidden = branches.hidden.flatten(0, 1)[at]
        position = branches.position.flatten().to(device)[at]
        self._hidden = torch.cat([self._hidden, hidden]) if self._hidden.numel() else hidden
        self._position = torch.cat([self._position.to(device), position])
        self._num_axes = branches.num_axes or self._num_axes
        self._places = None
        return tickets

    @torch.no_grad()
    def step(self) -> list[Decoded]:
        """Give every branch one token more; returns the questions of which the last branch has ended by it."""
        head = self._head
        logits, _ = final_logits(
            self._hidden.to(head.weight.device), head.weight, head.bias, head.softcap, head.logit_scale
        )
        questions = [self._questions[branch.row] for branch in self._living]
        who = to_device(
            [
                [question.ticket for question in questions],
                [branch.lane for branch in self._living],
                [len(branch.tokens) for branch in self._living],
            ],
            logits.device,
        )
        tokens = self.sampler(logits, *who)
        log_probs = None
        if self.with_log_probs:
            log_probs = logits.log_softmax(dim=-1).gather(1, tokens.clamp(min=0)[:, None])[:, 0].tolist()
        lasting, ended = self._record(tokens.tolist(), log_probs)
        finished = [self._decoded(question) for question in ended]
        wanted = [0 if self.more is None else self.more(*decoded.samples) for decoded in finished]
        for question, count in zip(ended, wanted, strict=True):
            if not count:
                del self._questions[question.row]
        if len(lasting) < len(self._living):
            at = to_device(lasting, tokens.device)
            tokens = tokens[at]
            self._position = self._position[at.to(self._position.device)]
            self._living = [self._living[i] for i in lasting]
            self._places = None
        self._hidden = self._forward(tokens) if self._living else self._hidden[:0]
        for question, count in zip(ended, wanted, strict=True):
            if count:
                self._extend(question, count)
        return [decoded for decoded, count in zip(finished, wanted, strict=True) if not count]

    def _record(self, tokens: list[int], log_probs: list[float] | None) -> tuple[list[int], list[_Question]]:
        """Note a step's tokens: which branches go on, and the questions of which none does."""
        lasting, ended = [], []
        for i, (branch, token) in enumerate(zip(self._living, tokens, strict=True)):
            if token < 0:
                raise not_finite()
            branch.tokens.append(token)
            if log_probs is not None:
                branch.log_probs.append(log_probs[i])
            branch.stopped = token in self.eos
            if not branch.stopped and len(branch.tokens) < self.max_new_tokens:
                lasting.append(i)
                continue
            question = self._questions[branch.row]
            question.free += branch.columns
            question.num_living -= 1
            if not question.num_living:
                ended.append(question)
        return lasting, ended

    def _decoded(self, question: _Question) -> Decoded:
        return Decoded(
            question.ticket,
            [branch.tokens for branch in question.branches],
            [branch.stopped for branch in question.branches],
            [branch.log_probs for branch in question.branches] if self.with_log_probs else [],
        )

    def _extend(self, question: _Question, count: int) -> None:
        """Begin so many branches more behind the prompt of a question whose branches have all ended."""
        assert question.prompt is not None
        visible, position, hidden = question.prompt
        row = question.row
        self._reserve(0, count, 0, self._visible.device)
        self._visible[row] = False
        self._visible[row, :count, : len(visible)] = visible
        new = [_Branch(row, lane) for lane in range(count)]
        question.branches += new
        question.num_living = count
        self._living += new
        self._hidden = torch.cat([self._hidden, hidden.expand(count, -1)])
        self._position = torch.cat([self._position, position.to(self._position.device).expand(count)])
        self._places = None

    def _forward(self, tokens: Tensor) -> Tensor:
        """Feed each living branch its last token, `(N,)`; gives the states that predict the next ones, `(N, H)`."""
        self._move_together()
        columns = [self._column_for(branch) for branch in self._living]
        num_keys = max(self._questions[branch.row].num_columns for branch in self._living)
        num_keys = -(-num_keys // KEYS_STEP) * KEYS_STEP
        num_rows = max(branch.row for branch in self._living) + 1
        self._reserve(num_rows, 0, num_keys, self._visible.device)
        device = self._visible.device
        row, lane, column, step = to_device(
            [
                [branch.row for branch in self._living],
                [branch.lane for branch in self._living],
                columns,
                [len(branch.tokens) - 1 for branch in self._living],
            ],
            device,
        )
        # A column that another branch has left is seen by nobody but its new owner.
        self._visible[row, :, column] = lane[:, None] == torch.arange(self._visible.shape[1], device=device)
        self.cache.placement = TokenPlacement(row, column, num_rows, num_keys)
        positions = (self._position + step.to(self._position.device))[None]
        if self._num_axes is not None:
            positions = positions.expand(self._num_axes, 1, -1)
        with active_layout(self._plan(num_rows, num_keys)):
            output = backbone_of(self.model)(
                input_ids=tokens[None],
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        return output.last_hidden_state[0]

    def _column_for(self, branch: _Branch) -> int:
        """A place for a branch's next key: one that an ended branch has left, else a new one."""
        question = self._questions[branch.row]
        if question.free:
            column = question.free.pop()
        else:
            column = question.num_columns
            question.num_columns += 1
        branch.columns.append(column)
        return column

    def _plan(self, num_rows: int, num_keys: int) -> BranchPlan:
        """Which query stands where for the attention, and what it sees."""
        if self._places is None:
            by_row: list[list[int]] = [[] for _ in range(num_rows)]
            for i, branch in enumerate(self._living):
                by_row[branch.row].append(i)
            most = max(map(len, by_row))
            places = [0] * len(self._living)
            for row, members in enumerate(by_row):
                for k, i in enumerate(members):
                    places[i] = row * most + k
            queries = [members + [0] * (most - len(members)) for members in by_row]
            lanes = [[self._living[i].lane for i in members] + [0] * (most - len(members)) for members in by_row]
            device = self._visible.device
            self._places = to_device(queries, device), to_device(places, device), to_device(lanes, device)
        query, place, lane = self._places
        seen = self._visible[:num_rows, :, :num_keys]
        mask = seen.gather(1, lane[:, :, None].expand(-1, -1, num_keys))
        # Where no query stands something must be seen, too.
        mask |= ~mask.any(dim=2, keepdim=True)
        return BranchPlan(mask[:, None], query, place)

    def _move_together(self) -> None:
        """Fill the gaps between rows in use from behind, once they are too many."""
        rows = sorted(self._questions)
        if len(rows) > DENSE_ENOUGH * (rows[-1] + 1):
            return
        gaps = [row for row in range(len(rows)) if row not in self._questions]
        sources = rows[len(rows) - len(gaps) :]
        self.cache.move(sources, gaps)
        self._visible[gaps] = self._visible[sources]
        for source, gap in zip(sources, gaps, strict=True):
            question = self._questions.pop(source)
            self._questions[gap] = question
            question.row = gap
            for branch in question.branches:
                branch.row = gap
        self._places = None

    def _reserve(self, num_rows: int, num_lanes: int, num_columns: int, device: torch.device) -> None:
        """Room for so many rows, lanes and columns, in the cache and in what says who sees what."""
        self.cache.reserve(num_rows, num_columns)
        old = self._visible
        size = (self.cache.num_rows, max(num_lanes, old.shape[1]), self.cache.capacity)
        if old.shape != size:
            self._visible = torch.zeros(size, dtype=torch.bool, device=device)
            self._visible[: old.shape[0], : old.shape[1], : old.shape[2]] = old.to(device)
