"""Held-out numbers of two rounds in, the change between them with its interval out; and the verdict in words.

Where the responses themselves are on disk the interval is paired over questions; otherwise it is built from the two
published intervals, which is wider, and the report says so.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from align.records import Evaluated, Evaluation
from align.report.metrics import HEADLINES, Metric, in_order, metric
from align.report.read import RoundData, RunData
from align.statistics import paired_difference
from reward.intervals import Interval, wilson
from reward.reliability import MIN_COUNT

LENGTH_DRIFT = 0.25
# Nothing is called better or worse on fewer held-out questions.
MIN_QUESTIONS = MIN_COUNT
State = Literal["better", "worse", "unclear", "neutral"]


@dataclass(frozen=True)
class Change:
    """How one number moved between two evaluated rounds (round 0 is the first policy)."""

    metric: Metric
    first_round: int
    last_round: int
    first: float
    last: float
    difference: Interval
    paired: bool

    @property
    def state(self) -> State:
        """Better or worse only where the interval excludes zero, over `MIN_QUESTIONS` questions or more."""
        if self.metric.good == 0 or not self.has_interval:
            return "neutral"
        if not self.is_beyond_chance:
            return "unclear"
        return "better" if self.difference.mean * self.metric.good > 0 else "worse"

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the interval excludes zero, and enough questions stand behind it."""
        return self.difference.excludes_zero and not self.too_few

    @property
    def too_few(self) -> bool:
        """Whether fewer questions than `MIN_QUESTIONS` stand behind it."""
        return self.difference.count < MIN_QUESTIONS

    @property
    def has_interval(self) -> bool:
        """False for numbers that are published without one."""
        return self.difference.high > self.difference.low or self.paired

    @property
    def span(self) -> str:
        """The interval of the change, as text."""
        show = self.metric.show_change
        return f"{show(self.difference.low)} to {show(self.difference.high)}"


def change(name: str, before: RoundData, after: RoundData) -> Change:
    """The change of a number from one round to another; both must have it."""
    first, last = before.metrics[name], after.metrics[name]
    known = metric(name)
    paired = _paired(known, before, after, first, last)
    difference = paired if paired is not None else _unpaired(first, last)
    if paired is not None and known.percent:
        difference = widened(difference)
    return Change(known, before.number, after.number, first.mean, last.mean, difference, paired is not None)


def widened(difference: Interval) -> Interval:
    """A paired difference of shares, where the bootstrap had nothing to draw from: every question moved alike.

    That n questions did not differ says that few of all would, not that none does:
    as far as Wilson's interval of 0 of n.

    >>> widened(Interval(0.0, 0.0, 0.0, 7)).high == wilson(0, 7).high
    True
    """
    if difference.high > difference.low:
        return difference
    reach = wilson(0, difference.count).high
    low, high = max(-1.0, difference.mean - reach), min(1.0, difference.mean + reach)
    return Interval(difference.mean, low, high, difference.count)


def headline(run: RunData) -> str | None:
    """The name of the number that the verdict speaks of: measured in at least one round."""
    return next((name for name in HEADLINES if any(name in data.metrics for data in run.rounds)), None)


@dataclass(frozen=True)
class History:
    """All changes of a run by the number's name: first evaluated round to its result, and every round to the next one.

    The result is the last evaluated round, or the one that was chosen; a round that was made from another than the one
    before is held against that.

    A number that fewer than two rounds have is in neither. A win rate is a change in itself, from the half that equal
    responses would give: one against the first policy has both, one against the round before has steps only.
    """

    overall: dict[str, Change]
    steps: dict[str, list[Change]]

    @property
    def length_drift(self) -> Change | None:
        """The change of response length, where it is more than a quarter and beyond its interval."""
        length = self.overall.get("response_tokens")
        if length is None or length.first <= 0 or not length.is_beyond_chance:
            return None
        return length if abs(length.last / length.first - 1) > LENGTH_DRIFT else None


def history(run: RunData) -> History:
    """Every metric's changes from round to round."""
    found = History({}, {})
    for name in in_order({name for data in run.rounds for name in data.metrics if metric(name).drawn}):
        against = metric(name).against
        have = [data for data in run.rounds if name in data.metrics and (data.number > 0 or not against)]
        if against == "before":
            found.steps[name] = [_won(name, data, data.parent) for data in have]
        elif against == "first" and have:
            found.steps[name] = [_won(name, have[0], 0), *_steps(name, have)]
            found.overall[name] = _won(name, _result(run, have), 0)
        elif len(have) > 1:
            found.steps[name] = _steps(name, have)
            found.overall[name] = change(name, have[0], _result(run, have))
    return found


def _result(run: RunData, rounds: list[RoundData]) -> RoundData:
    """The round that a run results in, of those that have a number; the last, where it results in the first policy."""
    return next((data for data in rounds[1:] if data.number == run.result), rounds[-1])


def _steps(name: str, rounds: list[RoundData]) -> list[Change]:
    """Every round against its parent, or the one before that has the number."""
    by_number = {data.number: data for data in rounds}
    return [change(name, by_number.get(after.parent, before), after) for before, after in itertools.pairwise(rounds)]


def _won(name: str, data: RoundData, before: int) -> Change:
    """A win rate as the change from round `before`, against which equal responses would win one half."""
    rate = data.metrics[name]
    difference = Interval(rate.mean - 0.5, rate.low - 0.5, rate.high - 0.5, rate.count)
    return Change(metric(name), before, data.number, 0.5, rate.mean, difference, paired=False)


def _paired(known: Metric, before: RoundData, after: RoundData, first: Interval, last: Interval) -> Interval | None:
    """Over the questions that both rounds answered, provided the responses on disk give the published means."""
    if known.of_response is None:
        return None
    old = {line.id: line for line in before.lines}
    new = {line.id: line for line in after.lines}
    ids = [id_ for id_ in old if id_ in new]
    for which in _responses_of(known.name):
        a = [_values(known, old[id_], which) for id_ in ids]
        b = [_values(known, new[id_], which) for id_ in ids]
        if _agrees(a, first) and _agrees(b, last):
            return paired_difference(a, b)
    return None


def _responses_of(name: str) -> tuple[str, ...]:
    if name.startswith("greedy"):
        return ("greedy",)
    if name.startswith("sampled"):
        return ("sampled",)
    return ("sampled", "greedy", "all")


def _values(known: Metric, line: Evaluation, which: str) -> list[float]:
    assert known.of_response is not None
    values = [known.of_response(line, response) for response in _pick(line, which)]
    return [value for value in values if value is not None]


def _pick(line: Evaluation, which: str) -> list[Evaluated]:
    if which == "greedy":
        return [line.greedy]
    return line.sampled if which == "sampled" else [line.greedy, *line.sampled]


def _agrees(values: list[list[float]], published: Interval) -> bool:
    flat = [value for row in values for value in row]
    return bool(flat) and math.isclose(math.fsum(flat) / len(flat), published.mean, rel_tol=1e-3, abs_tol=1e-3)


def _unpaired(first: Interval, last: Interval) -> Interval:
    """Difference of two means taken as independent: half widths add in quadrature (MOVER, Zou and Donner 2008)."""
    mean = last.mean - first.mean
    down = math.hypot(last.mean - last.low, first.high - first.mean)
    up = math.hypot(last.high - last.mean, first.mean - first.low)
    return Interval(mean, mean - down, mean + up, min(first.count, last.count))
