"""Tokenised pairs in; the rows that they are computed in, and the batches of pairs that come together, out.

With `dpo.rows: pair` every pair is a row ``[prompt | chosen | rejected]``. With `question` all pairs of a question
stand in one row, ``[prompt | response 1 | ... | response K]``, with every distinct response once: n pairs of K
responses of R tokens behind a prompt of P cost P + K R tokens and not n (P + 2 R). TRL gets the same two rows per pair
either way (`align.dpo.shared_forward`), so losses, metrics and references do not know of it.

>>> a = TokenizedPair("a", [], "?", 1, [3, 4], [5])
>>> b = TokenizedPair("b", [], "?", 1, [3, 4], [6])
>>> rows_of([a, b], "question")  # a row of three responses; the chosen ones of both pairs, then the rejected ones
([Row(prompt='?', image_files=[], branches=[[3, 4], [5], [6]])], [(0, 0), (0, 0), (0, 1), (0, 2)])
>>> len(rows_of([a, b], "pair")[0])
2
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.utils.data import Sampler

from align.dpo.tokenize import TokenizedPair
from align.errors import UserError

Grouping = Literal["pair", "question"]
SHOWN_ROWS = 10


@dataclass(frozen=True)
class Row:
    """A prompt with its images, which may be corrupted, and the token ids of the responses behind it."""

    prompt: str
    image_files: list[str]
    branches: list[list[int]]
    corrupted: bool = field(default=False, repr=False)


def rows_of(pairs: Sequence[TokenizedPair], grouping: Grouping) -> tuple[list[Row], list[tuple[int, int]]]:
    """The rows of n pairs, and for each of TRL's 2n responses (all chosen, then all rejected) its row and branch."""
    if grouping == "pair":
        rows = [Row(pair.prompt, pair.image_files, [pair.chosen_ids, pair.rejected_ids]) for pair in pairs]
        return rows, [(row, branch) for branch in range(2) for row in range(len(rows))]
    rows, places = [], {}
    for number, group in enumerate(by_question(pairs)):
        members = [pairs[index] for index in group]
        branches = _distinct(members)
        rows.append(Row(members[0].prompt, members[0].image_files, [list(ids) for ids in branches]))
        for index, pair in zip(group, members, strict=True):
            both = (branches.index(tuple(pair.chosen_ids)), branches.index(tuple(pair.rejected_ids)))
            places[index] = tuple((number, branch) for branch in both)
    return rows, [places[index][side] for side in range(2) for index in range(len(pairs))]


def corrupted_rows(
    pairs: Sequence[TokenizedPair], rows: Sequence[Row], places: Sequence[tuple[int, int]]
) -> tuple[list[Row], list[tuple[int, int]]]:
    """Beside the rows of n pairs: one with corrupted pictures for each that has pictures, with the chosen responses.

    `rows` and `places` are those of `rows_of`; the new rows are counted from `len(rows)` on. A pair without a picture
    gets the place of its chosen response as it is.

    >>> pair = TokenizedPair("a", ["a.png"], "?", 1, [3, 4], [5])
    >>> corrupted_rows([pair], *rows_of([pair], "pair"))
    ([Row(prompt='?', image_files=['a.png'], branches=[[3, 4]])], [(1, 0)])
    """
    added: dict[int, Row] = {}
    found = []
    for pair, (row, branch) in zip(pairs, places, strict=False):
        if not pair.image_files:
            found.append((row, branch))
            continue
        other = added.setdefault(row, Row(pair.prompt, pair.image_files, [], corrupted=True))
        if pair.chosen_ids not in other.branches:
            other.branches.append(pair.chosen_ids)
        found.append((len(rows) + list(added).index(row), other.branches.index(pair.chosen_ids)))
    return list(added.values()), found


def by_question(pairs: Sequence[TokenizedPair]) -> list[list[int]]:
    """The places of pairs that have the same prompt and images, together, in the order in which they come."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault((pair.prompt, *pair.image_files), []).append(index)
    return list(groups.values())


def pair_weights(pairs: Sequence[TokenizedPair], each: Grouping) -> list[float]:
    """What every pair counts in the mean of a step: 1, or with `question` so that every question counts 1.

    >>> a, b = TokenizedPair("a", [], "?", 1, [3], [5]), TokenizedPair("b", [], "!", 1, [3], [6])
    >>> pair_weights([a, a, b], "question")
    [0.5, 0.5, 1.0]
    """
    if each == "pair":
        return [1.0] * len(pairs)
    question = {index: number for number, group in enumerate(by_question(pairs)) for index in group}
    sizes = Counter(question.values())
    return [1 / sizes[question[index]] for index in range(len(pairs))]


@dataclass(frozen=True)
class RowSize:
    """Tokens of a row, or of the widest row of a batch: of the prompt, and of all responses together."""

    prompt: int
    responses: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt + self.responses

    def padded_to(self, other: RowSize) -> RowSize:
        """A row that either fits in."""
        return RowSize(max(self.prompt, other.prompt), max(self.responses, other.responses))


@dataclass(frozen=True)
class RowBatch:
    """Pairs that are computed together: their places in the dataset, how many rows they make, the widest of them."""

    pairs: list[int]
    num_rows: int
    size: RowSize
    copies: int = 1

    @property
    def tokens(self) -> int:
        """What is computed, padding and rows with corrupted pictures included."""
        return self.copies * self.num_rows * self.size.tokens


def make_batches(
    pairs: Sequence[TokenizedPair],
    grouping: Grouping,
    *,
    num_rows: int,
    max_tokens: int | None,
    seed: int,
    copies: int = 1,
) -> list[RowBatch]:
    """All pairs in batches of whole rows: of so many rows, or of as many as fit in `max_tokens` with their padding.

    The batches stay the same for the whole training. Those of a budget hold rows of similar length; the others are
    drawn by `seed`. `copies`: 2 where every row has another beside it with corrupted pictures.

    Raises:
        UserError: a single row has more tokens than the budget.

    >>> pairs = [TokenizedPair(str(n), [], str(n), 10 * n, [1], [2]) for n in range(1, 5)]
    >>> [batch.pairs for batch in make_batches(pairs, "pair", num_rows=1, max_tokens=66, seed=0)]
    [[3], [2, 1], [0]]
    """
    groups = by_question(pairs) if grouping == "question" else [[index] for index in range(len(pairs))]
    rows = [RowBatch(group, 1, _row_size([pairs[index] for index in group], grouping), copies) for group in groups]
    random.Random(f"{seed}/rows").shuffle(rows)
    if max_tokens is not None:
        _check_budget(rows, pairs, max_tokens, grouping)
        rows.sort(key=lambda row: (row.size.tokens, row.size.prompt), reverse=True)
    batches: list[RowBatch] = []
    for row in rows:
        if batches:
            last = batches[-1]
            wider = RowBatch(last.pairs + row.pairs, last.num_rows + 1, last.size.padded_to(row.size), copies)
            if wider.num_rows <= num_rows if max_tokens is None else wider.tokens <= max_tokens:
                batches[-1] = wider
                continue
        batches.append(row)
    return batches


class RowBatches(Sampler[list[int]]):
    """The batches of an epoch in order: the two largest first, so that memory runs out at once or never; others drawn.

    The second largest begins the first step of the optimiser, the largest the second step: only then the optimiser has
    its state, and nothing later takes more. Where there is one step, the largest begins it.

    The order depends on `seed` and on the epoch that `epoch` gives, and not on how many processes share it: process r
    of n takes every nth batch from the rth on. `per_step`: batches of a step, of all processes together.
    """

    def __init__(self, batches: Sequence[RowBatch], seed: int, epoch: Callable[[], int], per_step: int = 1) -> None:
        self.batches = sorted(batches, key=lambda batch: batch.tokens, reverse=True)
        self.seed = seed
        self.epoch = epoch
        self.per_step = per_step

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        first = 2 if len(self.batches) > self.per_step else 1
        order = [batch.pairs for batch in self.batches[first:]]
        random.Random(f"{self.seed}/{self.epoch()}").shuffle(order)
        order.insert(0, self.batches[first - 1].pairs)
        if first == 2:
            order.insert(self.per_step, self.batches[0].pairs)
        yield from order


def _row_size(pairs: Sequence[TokenizedPair], grouping: Grouping) -> RowSize:
    branches = _distinct(pairs) if grouping == "question" else [pairs[0].chosen_ids, pairs[0].rejected_ids]
    return RowSize(pairs[0].prompt_tokens, sum(map(len, branches)))


def _distinct(pairs: Sequence[TokenizedPair]) -> list[tuple[int, ...]]:
    """The different responses of pairs, in the order in which they come."""
    return list(dict.fromkeys(tuple(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)))


def _check_budget(
    rows: Sequence[RowBatch], pairs: Sequence[TokenizedPair], max_tokens: int, grouping: Grouping
) -> None:
    too_long = sorted((row for row in rows if row.tokens > max_tokens), key=lambda row: -row.tokens)
    if not too_long:
        return
    lines = [f"  {pairs[row.pairs[0]].id}: {row.tokens} tokens, {len(row.pairs)} pairs" for row in too_long]
    more = [f"  and {len(lines) - SHOWN_ROWS} more"] if len(lines) > SHOWN_ROWS else []
    raise UserError(
        f"{len(too_long)} of {len(rows)} rows have more tokens than dpo.tokens_per_batch, {max_tokens}:\n"
        + "\n".join([*lines[:SHOWN_ROWS], *more])
        + "\n",
        fix=f"set dpo.tokens_per_batch to at least {too_long[0].tokens}"
        + (", or dpo.rows: pair, or lower pairs.max_per_question" if grouping == "question" else ""),
    )
