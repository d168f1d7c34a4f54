"""A run's changes and its critic's figures in; what the run learned instead of being right, or besides, out.

A held-out number says whether the model improved; this says why it may not have: its critic rewarded length, or its
preferences were random. Every rule looks at data alone (what was chosen, what became longer), never at the critic's
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.report.changes import LENGTH_DRIFT, History
from align.report.critic_quality import Figures
from align.report.metrics import percent, plain
from align.report.read import RunData
from align.report.training_curves import end_of
from align.report.warnings import WEAK_ACCURACY, enough_pairs
from reward.intervals import Interval, wilson
from reward.reliability import MEASURES, MIN_COUNT, PAIR_MEASURES, Figure

# Of a run that did not improve: its critic loves length, so that a small drift its way is enough.
LENGTH_TAUGHT = 0.05
AGREEMENT = "pairs_agree_with_reference"


@dataclass(frozen=True)
class Diagnosis:
    """`short` continues the verdict's first sentence, `text` gives the evidence."""

    short: str
    text: str


def find_diagnoses(
    run: RunData, changes: History, critics: Mapping[int, Figures], *, improved: bool
) -> list[Diagnosis]:
    """What was learned, the most telling first; `improved` says that the run's held-out number rose beyond chance."""
    found = [_length(changes, list(critics.values()), improved=improved), _preferences(run, list(critics.values()))]
    return [diagnosis for diagnosis in found if diagnosis is not None]


def _length(changes: History, critics: Sequence[Figures], *, improved: bool) -> Diagnosis | None:
    """Responses moved in length beyond chance, and to where the critic's rewards point in every round.

    A run that improved is suspected from a drift of a quarter on, one that did not from a twentieth on.
    """
    length = changes.overall.get("response_tokens")
    if length is None or length.first <= 0 or not length.is_beyond_chance:
        return None
    drift = length.last / length.first - 1
    follows = [figure.value for figures in critics if (figure := _follows_length(figures)) is not None]
    agree = all((x > 0) == (drift > 0) for x in follows)
    if not follows or not agree or abs(sum(follows)) / len(follows) <= (MEASURES["length_correlation"].limit or 0.0):
        return None
    if abs(drift) <= (LENGTH_DRIFT if improved else LENGTH_TAUGHT):
        return None
    return Diagnosis(
        "part of it is length" if improved else "what it learned is length",
        f"{'Part of what' if improved else 'What'} was learned is length: {plain(length.first)} tokens per response"
        f" became {plain(length.last)} ({'+' if drift > 0 else ''}{percent(drift, 0)}), and among comparable responses"
        f" the critic's rewards follow length (correlation {_span(follows)}){_chosen(critics, longer=drift > 0)}.",
    )


def _follows_length(figures: Figures) -> Figure | None:
    """Among responses that are equally right, where that is known."""
    return figures.get("length_correlation_given_reference") or figures.get("length_correlation")


def _chosen(critics: Sequence[Figures], *, longer: bool) -> str:
    shares = [figures["chosen_longer"].value for figures in critics if "chosen_longer" in figures]
    if not shares:
        return ""
    share = sum(shares) / len(shares)
    return (
        f"; the {'longer' if longer else 'shorter'} response was chosen in {percent(share if longer else 1 - share)} of"
        " the pairs of unequal length"
    )


def _span(values: Sequence[float]) -> str:
    low, high = plain(min(values)), plain(max(values))
    return low if low == high else f"{low} to {high}"


def _preferences(run: RunData, critics: Sequence[Figures]) -> Diagnosis | None:
    """The pairs of all rounds, held against reference answers; where there are none,
    against what training made of them."""
    agreement = _pooled([figures[AGREEMENT] for figures in critics if AGREEMENT in figures])
    if agreement is None or agreement.count < MIN_COUNT:
        return _unlearned(run)
    if agreement.high >= (PAIR_MEASURES[AGREEMENT].limit or 0.0):
        return None
    evidence = (
        f"where a right response met a wrong one, the right one was chosen in {percent(agreement.mean, 0)} of"
        f" {agreement.count:,} pairs ({percent(agreement.low, 0)} to {percent(agreement.high, 0)}; random preferences"
        " give 50\u00a0%)."
    )
    if agreement.high < 0.5:
        return Diagnosis(
            "its preferences were wrong more often than right", f"It was trained on wrong preferences: {evidence}"
        )
    if agreement.low > 0.5:
        return Diagnosis(
            "its preferences were hardly better than random", f"It was trained on weak preferences: {evidence}"
        )
    return Diagnosis(
        "its preferences were no better than random",
        f"It was trained on preferences that are as good as random: {evidence}",
    )


def _pooled(figures: Sequence[Figure]) -> Interval | None:
    total = sum(figure.count for figure in figures)
    return wilson(round(sum(figure.value * figure.count for figure in figures)), total) if total else None


def _unlearned(run: RunData) -> Diagnosis | None:
    ends = [x for data in run.trained if enough_pairs(data) and (x := end_of(data, "rewards/accuracies")) is not None]
    if not ends or sum(ends) / len(ends) >= WEAK_ACCURACY:
        return None
    return Diagnosis(
        "training learned hardly anything from its pairs",
        "Training learned hardly anything from its pairs: at the end of a round it ranks"
        f" {percent(sum(ends) / len(ends), 0)} of them as wanted (random: 50\u00a0%). The preferences may be random, or"
        " the learning rate too small.",
    )
