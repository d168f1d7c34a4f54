"""A run's changes and its critic's figures in; what the run learned instead of being right, or besides, out.

A held-out number says whether the model improved; this says why it may not have: its critic rewarded length, or its
preferences were a coin's. Every rule looks at data alone (what was chosen, what became longer), never at the critic's
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.report.changes import LENGTH_DRIFT, History
from align.report.critic_quality import LEAST_AGREEMENT, MOST_LENGTH_CORRELATION, Trust
from align.report.metrics import percent, plain
from align.report.read import RunData
from align.report.training_curves import end_of
from align.report.warnings import LEAST_DECIDED, WEAK_ACCURACY
from align.statistics import Interval, wilson

# Of a run that did not improve: its critic loves length, so that a small drift its way is enough.
LENGTH_TAUGHT = 0.05


@dataclass(frozen=True)
class Diagnosis:
    """`short` continues the verdict's first sentence, `text` gives the evidence."""

    short: str
    text: str


def find_lessons(run: RunData, changes: History, trust: dict[int, Trust], *, improved: bool) -> list[Diagnosis]:
    """What was learned, the most telling first; `improved` says that the run's held-out number rose beyond chance."""
    found = [_length(changes, list(trust.values()), improved=improved), _preferences(run, list(trust.values()))]
    return [lesson for lesson in found if lesson is not None]


def _length(changes: History, trust: Sequence[Trust], *, improved: bool) -> Diagnosis | None:
    """Responses moved in length beyond chance, and to where the critic's rewards point in every round.

    A run that improved is suspected from a drift of a quarter on, one that did not from a twentieth on.
    """
    length = changes.overall.get("response_tokens")
    if length is None or length.first <= 0 or not length.difference.excludes_zero:
        return None
    drift = length.last / length.first - 1
    follows = [x for item in trust if (x := item.figures.get("reward_length_correlation")) is not None]
    agree = all((x > 0) == (drift > 0) for x in follows)
    if not follows or not agree or abs(sum(follows)) / len(follows) <= MOST_LENGTH_CORRELATION:
        return None
    if abs(drift) <= (LENGTH_DRIFT if improved else LENGTH_TAUGHT):
        return None
    return Diagnosis(
        "part of it is length" if improved else "what it learned is length",
        f"{'Part of what' if improved else 'What'} was learned is length: {plain(length.first)} tokens a response became "
        f"{plain(length.last)} ({'+' if drift > 0 else ''}{percent(drift, 0)}), and among comparable responses the "
        f"critic's rewards follow length (correlation {_span(follows)}){_chosen(trust, longer=drift > 0)}.",
    )


def _chosen(trust: Sequence[Trust], *, longer: bool) -> str:
    shares = [x for item in trust if (x := item.figures.get("chosen_longer")) is not None]
    if not shares:
        return ""
    share = sum(shares) / len(shares)
    return f"; the {'longer' if longer else 'shorter'} response was chosen in {percent(share if longer else 1 - share)} of the pairs of unequal length"


def _span(values: Sequence[float]) -> str:
    low, high = plain(min(values)), plain(max(values))
    return low if low == high else f"{low} to {high}"


def _preferences(run: RunData, trust: Sequence[Trust]) -> Diagnosis | None:
    """The pairs of all rounds, held against reference answers; where there are none, against what training made of them."""
    agreement = _pooled([item.agreement for item in trust if item.agreement is not None])
    if agreement is None or agreement.count < LEAST_DECIDED:
        return _unlearned(run)
    if agreement.high >= LEAST_AGREEMENT:
        return None
    evidence = (
        f"where a right response met a wrong one, the right one was chosen in {percent(agreement.mean, 0)} of "
        f"{agreement.count:,} pairs ({percent(agreement.low, 0)} to {percent(agreement.high, 0)}; a coin gives 50\u00a0%)."
    )
    if agreement.high < 0.5:
        return Diagnosis(
            "its preferences were wrong more often than right", f"It was trained on wrong preferences: {evidence}"
        )
    if agreement.low > 0.5:
        return Diagnosis(
            "its preferences were hardly better than a coin's", f"It was trained on weak preferences: {evidence}"
        )
    return Diagnosis(
        "its preferences were no better than a coin's", f"It was trained on preferences like a coin's: {evidence}"
    )


def _pooled(intervals: Sequence[Interval]) -> Interval | None:
    total = sum(item.count for item in intervals)
    return wilson(round(sum(item.mean * item.count for item in intervals)), total) if total else None


def _unlearned(run: RunData) -> Diagnosis | None:
    ends = [x for data in run.trained if (x := end_of(data, "rewards/accuracies")) is not None]
    if not ends or sum(ends) / len(ends) >= WEAK_ACCURACY:
        return None
    return Diagnosis(
        "training learned hardly anything from its pairs",
        f"Training learned hardly anything from its pairs: at the end of a round it ranks {percent(sum(ends) / len(ends), 0)} "
        "of them as wanted (a coin: 50\u00a0%). The preferences may be random, or the learning rate too small.",
    )
