"""How far a critic can be trusted: its judgements in; numbers for the manifest, the report and gates out.

Rewards compare only within one question, so every measure here works on differences within questions. What cannot be
measured (no verdicts, no reference answers) is None, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import combinations
from typing import Any

import numpy as np

from reward.critics.base import DECIMALS
from reward.errors import RewardError
from reward.judgement import Item, Judgement, Verdict
from reward.ranking import consistency, position_bias, tie_rate

MEASURES = {
    "unscored_rate": "responses that the critic could not score",
    "consistency": "pairs with the same verdict in both orders",
    "position_bias": "rate of preferring the first position minus that of the second",
    "tie_rate": "verdicts that are ties",
    "mean_option_mass": "probability that the critic answers in the words offered",
    "length_correlation": "correlation of reward with length within questions",
    "length_correlation_given_reference": "the same with correctness held fixed",
    "agreement_with_reference": "right-wrong pairs that the critic orders rightly (a tie counts half)",
    "agreement_between_critics": "pairs that two critics of the panel order the same way, lowest of all couples",
    "image_dependence": "preferences that change with the image: the lower of the two below",
    "image_dependence_blank": "preferences that change when the image is blank",
    "image_dependence_shuffled": "preferences that change when the image is another question's",
}


# What is left of values when their part in others is taken out counts as nothing below this share.
ROUNDING = 1e-7


@dataclass(frozen=True)
class Agreement:
    """How two critics order the pairs of responses that the second one orders strictly."""

    num_pairs: int
    num_same: int
    num_tied: int

    @property
    def rate(self) -> float | None:
        """Share ordered the same, a tie of the first critic counting half."""
        return (self.num_same + self.num_tied / 2) / self.num_pairs if self.num_pairs else None

    @property
    def rate_when_decided(self) -> float | None:
        """Share ordered the same among the pairs that both order strictly."""
        decided = self.num_pairs - self.num_tied
        return self.num_same / decided if decided else None


@dataclass(frozen=True)
class ImageDependence:
    """How much a control image changes what a critic prefers: share of preferences, and of how many."""

    changed: float
    num_compared: int


@dataclass(frozen=True)
class Control:
    """Items with other images; `places` are their places among the items that they were made of."""

    places: list[int]
    items: list[Item]


def measure_trust(
    judgements: Sequence[Judgement],
    *,
    lengths: Sequence[Sequence[int]] | None = None,
    reference: Sequence[Judgement] | None = None,
    blank: ImageDependence | None = None,
    shuffled: ImageDependence | None = None,
) -> dict[str, float | None]:
    """All MEASURES by name. `lengths` are those of the responses, `reference` the verifier's judgements."""
    verdicts = [judgement.verdicts for judgement in judgements]
    rewards = [reward for judgement in judgements for reward in judgement.rewards]
    return {
        "unscored_rate": sum(reward is None for reward in rewards) / len(rewards) if rewards else None,
        "consistency": consistency(verdicts),
        "position_bias": position_bias(verdicts),
        "tie_rate": tie_rate(verdicts),
        "mean_option_mass": _mean_option_mass(judgements),
        "length_correlation": length_correlation(judgements, lengths) if lengths else None,
        "length_correlation_given_reference": (
            length_correlation(judgements, lengths, given=reference) if lengths and reference else None
        ),
        "agreement_with_reference": agreement(judgements, reference).rate if reference else None,
        "agreement_between_critics": _lowest_agreement(judgements),
        "image_dependence": min((found.changed for found in (blank, shuffled) if found), default=None),
        "image_dependence_blank": blank.changed if blank else None,
        "image_dependence_shuffled": shuffled.changed if shuffled else None,
    }


def _mean_option_mass(judgements: Sequence[Judgement]) -> float | None:
    masses = [
        evidence["mean_option_mass"]
        for judgement in judgements
        for evidence in (judgement.evidence, *(member["evidence"] for member in _members(judgement).values()))
        if "mean_option_mass" in evidence
    ]
    return sum(masses) / len(masses) if masses else None


def _members(judgement: Judgement) -> dict[str, dict[str, Any]]:
    """What a panel's judgement keeps of its critics; empty for a single critic's."""
    return judgement.evidence.get("members", {})


def _lowest_agreement(judgements: Sequence[Judgement]) -> float | None:
    rates = [found.rate_when_decided for found in panel_agreement(judgements).values()]
    return min((rate for rate in rates if rate is not None), default=None)


def length_correlation(
    judgements: Sequence[Judgement], lengths: Sequence[Sequence[int]], *, given: Sequence[Judgement] | None = None
) -> float | None:
    """Pearson correlation of reward and length within questions; with `given`, the partial one with its rewards fixed.

    Each question's values are taken from their mean first, so that questions with long answers do not count as long
    answers preferred. None with fewer than three responses or where something does not vary (with `given`: follows from
    it, but for rounding).

    >>> length_correlation([Judgement(id="q", rewards=[1.0, 2.0, 3.0])], [[10, 20, 30]])
    1.0
    """
    rows = list(_aligned(judgements, lengths, given))
    if len(rows) < 3:
        return None
    table = np.array(rows)
    rewards, sizes = table[:, 0], table[:, 1]
    least = ROUNDING * np.linalg.norm(rewards), ROUNDING * np.linalg.norm(sizes)
    if given is not None:
        rewards, sizes = _without(rewards, table[:, 2]), _without(sizes, table[:, 2])
    spreads = np.linalg.norm(rewards), np.linalg.norm(sizes)
    if spreads[0] <= least[0] or spreads[1] <= least[1]:
        return None
    return round(float(rewards @ sizes / (spreads[0] * spreads[1])), 12)


def _aligned(
    judgements: Sequence[Judgement], lengths: Sequence[Sequence[int]], given: Sequence[Judgement] | None
) -> Iterator[list[float]]:
    """Reward, length and given reward of every response that has all of them, each less its question's mean.

    Rounded as rewards are, so that of equal ones exactly nothing is left.
    """
    for row, judgement in enumerate(judgements):
        columns: list[Sequence[float | None]] = [judgement.rewards, lengths[row]]
        if given is not None:
            columns.append(given[row].rewards)
        complete = [values for values in zip(*columns, strict=True) if None not in values]
        if len(complete) > 1:
            table = np.array(complete, dtype=float)
            yield from np.round(table - table.mean(axis=0), DECIMALS).tolist()


def _without(values: np.ndarray, given: np.ndarray) -> np.ndarray:
    """What is left of values when their linear part in `given` is taken out (both with mean 0)."""
    weight = float((given**2).sum())
    return values - given * (float((values * given).sum()) / weight) if weight > 0 else values


def agreement(judgements: Sequence[Judgement], others: Sequence[Judgement]) -> Agreement:
    """How often `judgements` order two responses of a question as `others` do, over pairs that `others` order.

    >>> agreement([Judgement(id="q", rewards=[3, 1, 1])], [Judgement(id="q", rewards=[1, 0, 1])])
    Agreement(num_pairs=2, num_same=1, num_tied=1)
    """
    return _agreement([one.rewards for one in judgements], [other.rewards for other in others])


Rewards = Sequence[float | None]


def _agreement(rewards: Sequence[Rewards], others: Sequence[Rewards]) -> Agreement:
    signs = [
        (_sign(one, pair), other_sign)
        for one, other in zip(rewards, others, strict=True)
        for pair in combinations(range(len(one)), 2)
        if (other_sign := _sign(other, pair)) and _sign(one, pair) is not None
    ]
    return Agreement(len(signs), sum(sign == other for sign, other in signs), sum(sign == 0 for sign, _ in signs))


def _sign(rewards: Sequence[float | None], pair: tuple[int, int]) -> int | None:
    one, other = rewards[pair[0]], rewards[pair[1]]
    return None if one is None or other is None else (one > other) - (one < other)


def panel_agreement(judgements: Sequence[Judgement]) -> dict[str, Agreement]:
    """Agreement of every two critics of a panel, by "one / other"; empty for a single critic."""
    rewards = [{name: member["rewards"] for name, member in _members(j).items()} for j in judgements]
    names = sorted({name for by_name in rewards for name in by_name})
    found = {}
    for one, other in combinations(names, 2):
        both = [by_name for by_name in rewards if one in by_name and other in by_name]
        found[f"{one} / {other}"] = _agreement([by_name[one] for by_name in both], [by_name[other] for by_name in both])
    return found


def blank_images(items: Sequence[Item], blank: Callable[[Any], Any]) -> Control:
    """The items with images, each image replaced by what `blank` makes of it (an empty one of its size)."""
    places = [place for place, item in enumerate(items) if item.images]
    return Control(places, [replace(items[p], images=tuple(map(blank, items[p].images))) for p in places])


def shuffle_images(items: Sequence[Item]) -> Control:
    """The items with the images of the next item that has as many but different ones; others are left out.

    >>> a, b = Item("a", "?", ("x",), ()), Item("b", "?", ("y",), ())
    >>> [item.images for item in shuffle_images([a, b]).items]
    [('y',), ('x',)]
    """
    places, changed = [], []
    for place, item in enumerate(items):
        following = (*items[place + 1 :], *items[:place])
        donor = next((other for other in following if _can_lend(other, item)), None)
        if item.images and donor is not None:
            places.append(place)
            changed.append(replace(item, images=donor.images))
    return Control(places, changed)


def _can_lend(donor: Item, item: Item) -> bool:
    return len(donor.images) == len(item.images) and donor.images != item.images


def image_dependence(real: Sequence[Judgement], control: Sequence[Judgement]) -> ImageDependence | None:
    """Share of preferences that are not the same with the control image; None if there is nothing to compare.

    Preferences are verdicts where both judgements have them, else pairs of rewards that the real judgement orders
    (a tie with the control image counts half). 0: the critic does not look at the image. A critic that looks, and
    knows nothing without it, changes about half.
    """
    changes = [change for one, other in zip(real, control, strict=True) for change in _changes(one, other)]
    return ImageDependence(sum(changes) / len(changes), len(changes)) if changes else None


def _changes(real: Judgement, control: Judgement) -> list[float]:
    if real.verdicts and control.verdicts:
        before, after = _winners(real.verdicts), _winners(control.verdicts)
        return [float(before[pair] != after[pair]) for pair in before if pair in after]
    pairs = combinations(range(len(real.rewards)), 2)
    signs = [(_sign(real.rewards, pair), _sign(control.rewards, pair)) for pair in pairs]
    return [abs(one - other) / 2 for one, other in signs if one and other is not None]


def _winners(verdicts: Sequence[Verdict]) -> dict[tuple[int, int], int | None]:
    return {(verdict.first, verdict.second): verdict.winner for verdict in verdicts}


def check_gates(gates: Mapping[str, float]) -> None:
    """Raise RewardError unless every gate is `max_` or `min_` before the name of a measure."""
    known = [f"{end}_{name}" for name in MEASURES for end in ("max", "min")]
    faults = []
    for gate in gates:
        if gate not in known:
            near = get_close_matches(gate, known, 1)
            faults.append(f"no gate is called {gate!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    if faults:
        raise RewardError("; ".join(faults) + f"; measures: {', '.join(MEASURES)}")


def failed_gates(measures: Mapping[str, float | None], gates: Mapping[str, float]) -> list[str]:
    """What a person's gates say against a critic, one line a failed gate; bias and correlations count by their size.

    A gate on something that could not be measured fails: it was set because it matters.

    >>> failed_gates({"position_bias": -0.4}, {"max_position_bias": 0.2})
    ['position_bias is -0.4, allowed at most 0.2 in size']
    """
    check_gates(gates)
    lines = []
    for gate, limit in gates.items():
        end, name = gate.split("_", 1)
        value = measures.get(name)
        if value is None:
            lines.append(f"{name} could not be measured, so {gate} ({limit:g}) does not hold")
            continue
        signed = name in ("position_bias", "length_correlation", "length_correlation_given_reference")
        size, note = (abs(value), " in size") if signed else (value, "")
        if (size > limit) if end == "max" else (size < limit):
            lines.append(f"{name} is {value:.3g}, allowed at {'most' if end == 'max' else 'least'} {limit:g}{note}")
    return lines
