"""Held-out responses in, the change by kind of question out: where the model became better.

Questions are grouped by the first of a few usual columns of `meta` that sorts them into 2 to 12 groups, else by how
their answers are compared.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from align.records import Evaluation
from align.report.changes import MIN_QUESTIONS, State, widened
from align.report.read import RunData
from align.statistics import paired_difference
from reward.intervals import Interval, clustered_share

COLUMNS = ("task", "category", "type", "dataset", "source", "subset", "skill", "topic", "kind")
MAX_GROUPS = 12


@dataclass(frozen=True)
class Category:
    """A group's share of right responses at first and last, with the paired change."""

    name: str
    count: int
    first: Interval
    last: Interval
    difference: Interval

    @property
    def state(self) -> State:
        """Better or worse only beyond chance, over enough questions."""
        if self.count < MIN_QUESTIONS or not self.difference.excludes_zero:
            return "unclear"
        return "better" if self.difference.mean > 0 else "worse"


@dataclass(frozen=True)
class Categories:
    column: str
    which: str
    categories: list[Category]


def by_category(run: RunData) -> Categories | None:
    """None with fewer than two evaluated rounds, without reference answers, or where nothing tells groups apart."""
    rounds = [data for data in run.rounds if data.lines]
    if len(rounds) < 2:
        return None
    last = next((data for data in rounds[1:] if data.number == run.result), rounds[-1])
    old = {line.id: line for line in rounds[0].lines}
    both = [(old[line.id], line) for line in last.lines if line.id in old]
    both = [
        (before, after)
        for before, after in both
        if before.greedy.correct is not None and after.greedy.correct is not None
    ]
    column = _column([after for _, after in both])
    if column is None:
        return None
    sampled = all(before.sampled and after.sampled for before, after in both)
    groups: dict[str, list[tuple[Evaluation, Evaluation]]] = {}
    for before, after in both:
        groups.setdefault(_group(after, column) or "other", []).append((before, after))
    found = [_category(name, lines, sampled=sampled) for name, lines in groups.items()]
    found.sort(key=lambda category: (-category.difference.mean, category.name))
    return Categories(column, "sampled" if sampled else "greedy", found)


def _category(name: str, lines: list[tuple[Evaluation, Evaluation]], *, sampled: bool) -> Category:
    first = [_right(before, sampled=sampled) for before, _ in lines]
    last = [_right(after, sampled=sampled) for _, after in lines]
    return Category(name, len(lines), _share(first), _share(last), widened(paired_difference(first, last)))


def _share(answers: list[list[float]]) -> Interval:
    return clustered_share([sum(right) for right in answers], [len(right) for right in answers])


def _right(line: Evaluation, *, sampled: bool) -> list[float]:
    return [float(bool(response.correct)) for response in (line.sampled if sampled else [line.greedy])]


def _column(lines: list[Evaluation]) -> str | None:
    for column in (*COLUMNS, "answer_kind"):
        groups = Counter(_group(line, column) for line in lines)
        if 2 <= len(groups) <= MAX_GROUPS:
            return column
    return None


def _group(line: Evaluation, column: str) -> str | None:
    value = line.question.answer_kind if column == "answer_kind" else line.question.meta.get(column)
    return str(value) if isinstance(value, str | int) else None
