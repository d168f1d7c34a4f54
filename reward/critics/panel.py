"""Several critics together: items in; a weighted mean of their normalised rewards, and how far they disagree, out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from reward.critics.base import DECIMALS, BaseCritic, Item, Judgement
from reward.errors import RewardError

NOBODY_SCORED = "no critic of the panel could score the item"

Values = dict[int, float]


class PanelCritic(BaseCritic):
    """Asks every critic and averages what they say, each brought to a common scale within the question.

    weights: by critic name; a name left out weighs 1.
    normalise: `zscore` (mean 0, standard deviation 1), `rank` (-1 worst to 1 best, ties share), `range` (0 worst to
        1 best), or `none`. All of it within one question, because only there rewards compare.
    need_all: a critic that could score nothing of an item (the verifier without a reference answer, say) leaves the
        item unscored; otherwise the others decide.

    Of the members' verdicts and ratings the first critic's that made any are kept as the panel's; rewards, reasons and
    evidence of every member stand in the evidence. A response that one of the deciding critics could not score is
    unscored: averages over different critics do not compare.
    """

    critics: dict[str, Any] = Field(exclude=True, min_length=1)
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    normalise: Literal["zscore", "rank", "range", "none"] = "zscore"
    need_all: bool = False

    def model_post_init(self, context: Any) -> None:
        """What the settings lead to; raises RewardError where they cannot be used."""
        unknown = [name for name in self.weights if name not in self.critics]
        if unknown:
            raise RewardError("; ".join(f"weight for {name!r}, which is not in the panel" for name in unknown))

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        by_name = {name: critic.judge(items) for name, critic in self.critics.items()}
        members = [{name: judgements[row] for name, judgements in by_name.items()} for row in range(len(items))]
        return [self._combine(item, judged) for item, judged in zip(items, members, strict=True)]

    def _combine(self, item: Item, members: dict[str, Judgement]) -> Judgement:
        silent = [name for name, judged in members.items() if not judged.decided]
        deciding = [] if silent and self.need_all else [name for name in members if name not in silent]
        unscored = _unscored(item, members, deciding, silent)
        left = [index for index in range(len(item.responses)) if index not in unscored]
        normal = {name: NORMALISERS[self.normalise](_values(members[name], left)) for name in deciding}
        rewards = [None if index in unscored else self._mean(normal, index) for index in range(len(item.responses))]
        verdicts = next((judged.verdicts for judged in members.values() if judged.verdicts), [])
        ratings = next((judged.ratings for judged in members.values() if judged.ratings), [])
        evidence = self._evidence(members, normal, left, silent)
        return Judgement(
            id=item.id,
            rewards=rewards,
            verdicts=verdicts,
            ratings=ratings,
            unscored=unscored,
            evidence=evidence,
        )

    def _mean(self, normal: dict[str, Values], index: int) -> float:
        weights = {name: self.weights.get(name, 1.0) for name in normal}
        total = sum(weights.values())
        return round(sum(weights[name] * values[index] for name, values in normal.items()) / total, DECIMALS)

    def _evidence(
        self, members: dict[str, Judgement], normal: dict[str, Values], left: list[int], silent: list[str]
    ) -> dict[str, Any]:
        spread = {str(i): statistics.pstdev([values[i] for values in normal.values()]) for i in left if normal}
        evidence: dict[str, Any] = {"members": {name: _kept(judged) for name, judged in members.items()}}
        evidence["disagreement"] = spread
        if silent:
            evidence["silent"] = silent
        correct = [judged.evidence["correct"] for judged in members.values() if "correct" in judged.evidence]
        return evidence | ({"correct": min(correct, key=lambda flags: None in flags)} if correct else {})


def _kept(judgement: Judgement) -> dict[str, Any]:
    reasons = {str(index): reason for index, reason in judgement.unscored.items()}
    return {"rewards": judgement.rewards, "unscored": reasons, "evidence": judgement.evidence}


def _unscored(item: Item, members: dict[str, Judgement], deciding: list[str], silent: list[str]) -> dict[int, str]:
    if not deciding:
        reasons = [f"{name}: {reason}" for name in silent for reason in dict.fromkeys(members[name].unscored.values())]
        return dict.fromkeys(range(len(item.responses)), "; ".join(reasons) or NOBODY_SCORED)
    unscored: dict[int, str] = {}
    for name in deciding:
        for index, reason in members[name].unscored.items():
            unscored.setdefault(index, f"{name}: {reason}")
    return unscored


def _values(judgement: Judgement, left: list[int]) -> Values:
    return {index: reward for index in left if (reward := judgement.rewards[index]) is not None}


def zscores(values: Values) -> Values:
    """Mean 0, standard deviation 1; all 0 where the values do not differ.

    >>> zscores({0: 1.0, 1: 3.0})
    {0: -1.0, 1: 1.0}
    """
    mean, spread = statistics.fmean(values.values()) if values else 0.0, statistics.pstdev(values.values() or [0.0])
    return {index: (value - mean) / spread if spread > 0 else 0.0 for index, value in values.items()}


def ranks(values: Values) -> Values:
    """From -1 (worst) to 1 (best) in equal steps; equal values share the mean of their places.

    >>> ranks({0: 5.0, 1: 7.0, 2: 5.0, 3: 9.0})
    {0: -0.6666666666666666, 1: 0.3333333333333333, 2: -0.6666666666666666, 3: 1.0}
    """
    num, found = len(values), list(values.values())
    return {
        index: sum((value > other) - (value < other) for other in found) / max(num - 1, 1)
        for index, value in values.items()
    }


def ranges(values: Values) -> Values:
    """From 0 (worst) to 1 (best); all 0 where the values do not differ."""
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    return {index: (value - low) / (high - low) if high > low else 0.0 for index, value in values.items()}


NORMALISERS: dict[str, Callable[[Values], Values]] = {
    "zscore": zscores,
    "rank": ranks,
    "range": ranges,
    "none": dict,
}
