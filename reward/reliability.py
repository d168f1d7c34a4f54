"""How far a critic can be relied on: its judgements in; figures, with their limits, warnings and gates, out.

The one place for measures and thresholds: scoring, gates, warnings and the report read it. Rewards compare only within
one question, so every measure works on differences within questions. What cannot be measured (no verdicts, no reference
answers) is left out, never 0; nothing is called good or bad on fewer than MIN_COUNT comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

from reward.critics.base import DECIMALS
from reward.errors import RewardError
from reward.intervals import clustered_share, correlation_bounds
from reward.judgement import Judgement, Verdict
from reward.ranking import both_orders, score_of, sign

MIN_COUNT = 20

Rounded = Annotated[float, PlainSerializer(lambda value: round(value, 4))]
Rewards = Sequence[float | None]
# What is counted of one question, and of how many comparisons.
Part = tuple[float, int]


class Figure(BaseModel):
    """A measure's value, the ends of its 95 % interval, and over how many comparisons and questions it was taken."""

    model_config = ConfigDict(frozen=True)

    value: Rounded
    low: Rounded | None = None
    high: Rounded | None = None
    count: int
    questions: int

    @property
    def enough(self) -> bool:
        """Whether there are comparisons enough to call it good or bad."""
        return self.count >= MIN_COUNT


@dataclass(frozen=True)
class Measure:
    """What a figure is called and means, what its `count` counts, and beyond which limit a person is warned.

    `bad` says which values are: `low` ones below the limit, or those of a `size` (whatever the sign) above it. A
    warning is serious where the whole interval lies beyond `serious`.
    """

    label: str
    meaning: str
    counted: str
    limit: float | None = None
    serious: float | None = None
    bad: Literal["low", "size"] = "low"
    percent: bool = True

    def show(self, value: float) -> str:
        """A value as text."""
        return f"{value:.1%}" if self.percent else f"{value:.2f}"

    def is_beyond(self, figure: Figure) -> bool:
        """Whether the value lies beyond the limit, on comparisons enough to say so."""
        return self.limit is not None and figure.enough and self._beyond(figure.value, self.limit)

    def is_serious(self, figure: Figure) -> bool:
        """Whether the whole interval lies beyond the serious limit, or the value where there is no interval."""
        if self.serious is None or not self.is_beyond(figure):
            return False
        ends = [figure.value] if figure.low is None or figure.high is None else [figure.low, figure.high]
        return all(self._beyond(end, self.serious) for end in ends)

    def _beyond(self, value: float, limit: float) -> bool:
        return value < limit if self.bad == "low" else abs(value) > limit


_PAIRS, _VERDICTS, _RIGHT_WRONG = "pairs judged in both orders", "verdicts", "right-wrong pairs"

MEASURES = {
    "unscored_rate": Measure("Not scored", "responses that the critic could not score", "responses"),
    "consistency": Measure(
        "Same verdict in both orders", "pairs judged alike when the two responses change places", _PAIRS, 0.7, 0.5
    ),
    "position_bias": Measure(
        "Position bias", "rate of preferring the first place minus that of the second; 0 is none", _PAIRS,
        0.1, 0.5, "size", percent=False,
    ),
    "tie_rate": Measure("Ties", "verdicts without a winner", _VERDICTS),
    "mean_option_mass": Measure(
        "Answers in the words offered", "probability of the offered answers together", "questions", 0.5, 0.05
    ),
    "length_correlation": Measure(
        "Reward follows length", "correlation of reward and length within questions; 0 is none", "responses",
        0.3, None, "size", percent=False,
    ),
    "length_correlation_given_reference": Measure(
        "Reward follows length among equals", "the same among responses that are equally right", "responses",
        0.3, None, "size", percent=False,
    ),
    "agreement_with_reference": Measure(
        "Orders right above wrong", "right-wrong pairs that it orders so, a tie being half", _RIGHT_WRONG, 0.65, 0.5
    ),
    "agreement_between_critics": Measure(
        "The panel agrees", "pairs that two of its critics order alike, lowest of all couples", "pairs both order"
    ),
    "agreement_with_people": Measure(
        "Agrees with people", "Cohen's kappa of its preferences and people's: 1 always, 0 as by chance", "ratings",
        0.2, 0.0, percent=False,
    ),
    "agreement_between_people": Measure(
        "People agree with each other", "Cohen's kappa of every two people over what both compared",
        "comparisons that two people made", 0.2, None, percent=False,
    ),
    "image_dependence": Measure(
        "Changes its mind with the image", "preferences that change with the image: the lower of the two below",
        "preferences", 0.1, 0.02,
    ),
    "image_dependence_blank": Measure(
        "Changes its mind on a blank image", "preferences that change when the image is blank; 0: it does not look",
        "preferences", 0.1, 0.02,
    ),
    "image_dependence_shuffled": Measure(
        "Changes its mind on another image", "preferences that change when the image is another question's",
        "preferences", 0.1, 0.02,
    ),
}  # fmt: skip

# Of the pairs that are made of its rewards; gates are held before there are any.
PAIR_MEASURES = {
    "pairs_agree_with_reference": Measure(
        "Agrees with reference answers",
        "pairs that chose the right response, of those that set a right one against a wrong one", _RIGHT_WRONG,
        0.65, 0.5,
    ),
    "chosen_longer": Measure("Chosen is the longer one", "of the pairs of unequal length", "pairs"),
}  # fmt: skip


def measure(
    judgements: Sequence[Judgement],
    *,
    lengths: Mapping[str, Sequence[int]] | None = None,
    reference: Mapping[str, Judgement] | None = None,
    controls: Mapping[str, Sequence[Judgement]] | None = None,
) -> dict[str, Figure]:
    """Every one of MEASURES that can be taken, by name.

    By question id, `lengths` are the responses' and `reference` the verifier's judgements; `controls` are judgements of
    the same questions with images that are `blank` or `shuffled`.
    """
    verdicts = [judgement.verdicts for judgement in judgements]
    found: dict[str, Figure | None] = {
        "unscored_rate": share(_unscored(judgement.rewards) for judgement in judgements),
        "consistency": consistency(verdicts),
        "position_bias": position_bias(verdicts),
        "tie_rate": tie_rate(verdicts),
        "mean_option_mass": share((mass, 1) for mass in _option_masses(judgements)),
        "agreement_between_critics": _lowest(panel_agreement(judgements).values()),
    }
    if lengths is not None:
        found["length_correlation"] = length_correlation(judgements, lengths)
        if reference is not None:
            found["length_correlation_given_reference"] = length_correlation(judgements, lengths, given=reference)
    if reference is not None:
        both = [(judgement.rewards, reference[judgement.id].rewards) for judgement in judgements]
        found["agreement_with_reference"] = agreement(both)
    by_id = {judgement.id: judgement for judgement in judgements}
    looks = {
        f"image_dependence_{name}": image_dependence([(by_id[line.id], line) for line in lines if line.id in by_id])
        for name, lines in (controls or {}).items()
    }
    found |= {"image_dependence": _lowest(looks.values())} | looks
    return {name: figure for name in MEASURES if (figure := found.get(name)) is not None}


def read_figures(data: Any) -> dict[str, Figure]:
    """The figures that a manifest holds by name; what is not one is left out."""
    found = {}
    for name, value in data.items() if isinstance(data, dict) else ():
        with suppress(ValidationError):
            found[str(name)] = Figure.model_validate(value)
    return found


def share(parts: Iterable[Part], *, signed: bool = False) -> Figure | None:
    """A share over questions with its interval; `signed` ones go from -1 to 1. None without any comparison."""
    rows = [(value, size) for value, size in parts if size]
    if not rows:
        return None
    sums = [(value + size) / 2 for value, size in rows] if signed else [value for value, _ in rows]
    found = clustered_share(sums, [size for _, size in rows])
    ends = [2 * end - 1 if signed else end for end in (found.mean, found.low, found.high)]
    return Figure(value=ends[0], low=ends[1], high=ends[2], count=found.count, questions=len(rows))


def _lowest(figures: Iterable[Figure | None]) -> Figure | None:
    return min((figure for figure in figures if figure is not None), key=lambda figure: figure.value, default=None)


def _unscored(rewards: Rewards) -> Part:
    return sum(reward is None for reward in rewards), len(rewards)


def consistency(verdicts_by_item: Iterable[Sequence[Verdict]]) -> Figure | None:
    """Share of compared pairs in which both orders say the same (same winner, or a tie twice).

    >>> forth = Verdict(first=0, second=1, p_first=1, p_second=0, winner=0)
    >>> back = Verdict(first=1, second=0, p_first=1, p_second=0, winner=1)
    >>> consistency([[forth, back]]).value
    0.0
    """
    return _over_both_orders(verdicts_by_item, lambda forth, back: float(forth.winner == back.winner))


def position_bias(verdicts_by_item: Iterable[Sequence[Verdict]]) -> Figure | None:
    """Rate of preferring the first position minus that of the second, over pairs judged in both orders; -1 to 1.

    0 is what a critic without bias gives, whatever the responses; 1 always prefers the first.
    """
    return _over_both_orders(verdicts_by_item, lambda forth, back: (score_of(forth) + score_of(back)) / 2, signed=True)


def _over_both_orders(
    verdicts_by_item: Iterable[Sequence[Verdict]], value: Callable[[Verdict, Verdict], float], *, signed: bool = False
) -> Figure | None:
    rows = [[value(*both) for both in both_orders([verdicts])] for verdicts in verdicts_by_item]
    return share(((sum(row), len(row)) for row in rows), signed=signed)


def tie_rate(verdicts_by_item: Iterable[Sequence[Verdict]]) -> Figure | None:
    """Share of verdicts that are ties."""
    return share((sum(v.winner is None for v in verdicts), len(verdicts)) for verdicts in verdicts_by_item)


def _option_masses(judgements: Sequence[Judgement]) -> list[float]:
    return [
        min(evidence["mean_option_mass"], 1.0)
        for judgement in judgements
        for evidence in (judgement.evidence, *(member["evidence"] for member in _members(judgement).values()))
        if "mean_option_mass" in evidence
    ]


def _members(judgement: Judgement) -> dict[str, dict[str, Any]]:
    """What a panel's judgement keeps of its critics; empty for a single critic's."""
    return judgement.evidence.get("members", {})


def length_correlation(
    judgements: Sequence[Judgement],
    lengths: Mapping[str, Sequence[int]],
    *,
    given: Mapping[str, Judgement] | None = None,
) -> Figure | None:
    """Pearson correlation of reward and length among the responses to a question; with `given`, among those that have
    the same reward there (are equally right).

    Each group's values are taken from their mean first, so that questions with long answers do not count as long
    answers preferred. None with fewer than three responses or where something does not vary.

    >>> length_correlation([Judgement(id="q", rewards=[1.0, 2.0, 3.0])], {"q": [10, 20, 30]}).value
    1.0
    """
    rows, groups, questions = [], 0, set()
    for judgement in judgements:
        for points in _comparable(judgement, lengths[judgement.id], given[judgement.id] if given else None):
            table = np.array(points, dtype=float)
            # Rounded as rewards are, so that of equal ones exactly nothing is left.
            rows.append(np.round(table - table.mean(axis=0), DECIMALS))
            groups += 1
            questions.add(judgement.id)
    count = sum(len(points) for points in rows)
    if count < 3:
        return None
    rewards, sizes = np.concatenate(rows).T
    spreads = float(np.linalg.norm(rewards)), float(np.linalg.norm(sizes))
    if not spreads[0] or not spreads[1]:
        return None
    value = round(float(rewards @ sizes) / (spreads[0] * spreads[1]), 12)
    low, high = correlation_bounds(value, count - groups) or (None, None)
    return Figure(value=value, low=low, high=high, count=count, questions=len(questions))


def _comparable(judgement: Judgement, lengths: Sequence[int], given: Judgement | None) -> list[list[tuple[float, int]]]:
    """(reward, length) of the responses that have both, by their reward in `given`; groups of one say nothing."""
    groups: dict[float | None, list[tuple[float, int]]] = {}
    keys = given.rewards if given else [0.0] * len(lengths)
    for reward, length, key in zip(judgement.rewards, lengths, keys, strict=True):
        if reward is not None and key is not None:
            groups.setdefault(key, []).append((reward, length))
    return [points for points in groups.values() if len(points) > 1]


def agreement(pairs_of_rewards: Iterable[tuple[Rewards, Rewards]], *, ties: bool = True) -> Figure | None:
    """How often the first rewards order two responses of a question as the second ones do, over pairs that those order.

    A tie of the first counts half, or not at all without `ties`.

    >>> agreement([([3, 1, 1], [1, 0, 1])]).value  # 0-1 the same, 1-2 tied
    0.75
    """
    parts = []
    for rewards, others in pairs_of_rewards:
        signs = [
            mine * theirs
            for pair in combinations(range(len(rewards)), 2)
            if (theirs := sign(others, pair)) and (mine := sign(rewards, pair)) is not None and (ties or mine)
        ]
        parts.append((sum((1 + product) / 2 for product in signs), len(signs)))
    return share(parts)


def panel_agreement(judgements: Sequence[Judgement]) -> dict[str, Figure | None]:
    """Agreement of every two critics of a panel over the pairs that both order, by "one / other"."""
    rewards = [{name: member["rewards"] for name, member in _members(j).items()} for j in judgements]
    names = sorted({name for by_name in rewards for name in by_name})
    return {
        f"{one} / {other}": agreement(
            ((by_name[one], by_name[other]) for by_name in rewards if one in by_name and other in by_name), ties=False
        )
        for one, other in combinations(names, 2)
    }


def image_dependence(both: Iterable[tuple[Judgement, Judgement]]) -> Figure | None:
    """Share of preferences (real, control) that are not the same with the control's image.

    Preferences are verdicts where both judgements have them, else pairs of rewards that the real judgement orders
    (a tie with the control image counts half). 0: the critic does not look at the image. A critic that looks, and
    knows nothing without it, changes about half.
    """
    changes = [_changes(real, control) for real, control in both]
    return share((sum(row), len(row)) for row in changes)


def _changes(real: Judgement, control: Judgement) -> list[float]:
    if real.verdicts and control.verdicts:
        before, after = _winners(real.verdicts), _winners(control.verdicts)
        return [float(before[pair] != after[pair]) for pair in before if pair in after]
    pairs = combinations(range(len(real.rewards)), 2)
    signs = [(sign(real.rewards, pair), sign(control.rewards, pair)) for pair in pairs]
    return [abs(one - other) / 2 for one, other in signs if one and other is not None]


def _winners(verdicts: Sequence[Verdict]) -> dict[tuple[int, int], int | None]:
    return {(verdict.first, verdict.second): verdict.winner for verdict in verdicts}


def check_gates(gates: Mapping[str, float], measures: Mapping[str, Measure] = MEASURES) -> None:
    """Raise RewardError unless every gate is `max_` or `min_` before the name of a measure."""
    known = [f"{end}_{name}" for name in measures for end in ("max", "min")]
    faults = []
    for gate in gates:
        if gate not in known:
            near = get_close_matches(gate, known, 1)
            faults.append(f"no gate is called {gate!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    if faults:
        raise RewardError("; ".join(faults) + f"; measures: {', '.join(measures)}")


def failed_gates(
    figures: Mapping[str, Figure], gates: Mapping[str, float], measures: Mapping[str, Measure] = MEASURES
) -> list[str]:
    """What a person's gates say against what was measured, one line per failed gate.

    Bias and correlations count by their size.

    A gate on something that could not be measured, or not often enough, fails: it was set because it matters.

    >>> failed_gates({"position_bias": Figure(value=-0.4, count=50, questions=9)}, {"max_position_bias": 0.2})
    ['position_bias is -0.4 (50 pairs judged in both orders), allowed at most 0.2 in size']
    """
    check_gates(gates, measures)
    lines = []
    for gate, limit in gates.items():
        end, name = gate.split("_", 1)
        figure, known = figures.get(name), measures[name]
        if figure is None:
            lines.append(f"{name} could not be measured, so {gate} ({limit:g}) does not hold")
            continue
        count = f"{figure.count} {known.counted}"
        if not figure.enough:
            lines.append(f"{name} was measured on {count} only, too few (below {MIN_COUNT}) for {gate} ({limit:g})")
            continue
        size, note = (abs(figure.value), " in size") if known.bad == "size" else (figure.value, "")
        if (size > limit) if end == "max" else (size < limit):
            allowed = f"allowed at {'most' if end == 'max' else 'least'} {limit:g}{note}"
            lines.append(f"{name} is {figure.value:.3g} ({count}), {allowed}")
    return lines
