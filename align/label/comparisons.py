"""A round in, the pairs of responses that people compare out: blind, in an order that depends on a seed alone.

All annotators get the same pairs in the same order, so that what two of them have done overlaps as far as possible;
which response stands on the left is drawn for each annotator and pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from align.errors import UserError
from align.records import Pair, Question, Samples, iter_jsonl
from align.run.folder import Round
from align.run.hashes import text_hash
from reward.texts import normalise


@dataclass(frozen=True)
class Comparison:
    """Two responses to a question, by their indices in the samples, the lower one first."""

    question: Question
    responses: tuple[int, int]
    texts: tuple[str, str]

    @property
    def id(self) -> str:
        """Which question and responses these are."""
        return f"{self.question.id}/{self.responses[0]}-{self.responses[1]}"


def draw_comparisons(this: Round, *, number: int, seed: int) -> list[Comparison]:
    """`number` comparisons at most, one per question, in the order in which they are shown.

    Where the round's pairs are made they are the pairs to look at: what the critic decided. Before that, two different
    responses are drawn for each question.

    Raises:
        UserError: the round has no complete sample stage, or no question has two different responses.
    """
    this.need("sample", "its responses are compared", f"align sample --round {this.number}")
    decided = dict(_decided(this)) if this.manifest.complete("pairs") else None
    found = []
    for line in iter_jsonl(this.samples, Samples):
        both = _drawn(line, seed) if decided is None else decided.get(line.id)
        if both is not None and max(both) < len(line.responses):
            texts = (line.responses[both[0]].text, line.responses[both[1]].text)
            found.append(Comparison(line.question, both, texts))
    if not found:
        raise UserError("no question has two different responses to compare", where=str(this.samples))
    random.Random(f"{seed}/{this.number}").shuffle(found)
    return found[:number]


def sides(comparison: Comparison, annotator: str, seed: int) -> tuple[int, int]:
    """0 and 1 or 1 and 0: which of the two responses stands left and right for this person."""
    left = int(text_hash(str(seed), annotator, comparison.id)[:8], 16) % 2
    return (left, 1 - left)


def _decided(this: Round) -> Iterator[tuple[str, tuple[int, int]]]:
    """The first own pair of every question; those of earlier rounds are of other responses."""
    seen = set()
    for pair in iter_jsonl(this.pairs, Pair):
        indices = pair.responses
        if pair.question_id is not None and indices and pair.question_id not in seen:
            seen.add(pair.question_id)
            low, high = sorted((indices["chosen"], indices["rejected"]))
            yield pair.question_id, (low, high)


def _drawn(line: Samples, seed: int) -> tuple[int, int] | None:
    """Two responses that differ and are not empty."""
    firsts: dict[str, int] = {}
    for index, response in enumerate(line.responses):
        firsts.setdefault(normalise(response.text), index)
    firsts.pop("", None)
    if len(firsts) < 2:
        return None
    low, high = sorted(random.Random(f"{seed}/{line.id}").sample(sorted(firsts.values()), 2))
    return low, high
