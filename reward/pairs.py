"""Rewards of one question's responses in; preference pairs out, and a count by reason of everything left out.

A response is left out because it was excluded, unscored, or repeats another one; of the remaining `n` every one of
the `n (n - 1) / 2` pairs is either chosen or dropped for a reason. Nothing is drawn at random. What concerns all
questions together (length balance, pairs of earlier rounds) is in `reward.replay`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from reward.texts import normalise, similarity

UNSCORED = "unscored"
SAME_TEXT = "same text as another response"
NEAR_DUPLICATE = "nearly the same text as another response"
TIED = "tied reward"
BELOW_MARGIN = "below the minimum margin"
NOT_IN_STRATEGY = "not picked by the strategy"
OVER_LIMIT = "over the limit per question"
LENGTHS_DIFFER = "lengths differ too much"
DISAGREES = "reward disagrees with the reference answer"
BOTH_SAME = "both correct or both wrong"
NO_CORRECTNESS = "not known whether correct"


class PairChoice(NamedTuple):
    """Indices of the chosen and the rejected response, and by how much the chosen one's reward is higher (> 0)."""

    chosen: int
    rejected: int
    margin: float


class PairSettings(BaseModel):
    """From rewards to preference pairs: which responses of a question, and which pairs of the round."""

    model_config = ConfigDict(extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False)

    strategy: Literal["best_worst", "topk_bottomk", "all_above_margin", "closest_above_margin", "correct_incorrect"] = (
        Field("best_worst", description="which responses of a question become a pair")
    )
    min_margin: float = Field(0.0, ge=0, description="least difference of the two rewards; ties never make a pair")
    max_per_question: int = Field(1, ge=1, description="most pairs per question")
    top_k_pairs: int = Field(2, ge=1, description="for topk_bottomk: how many of the best and of the worst are crossed")
    correct_threshold: float = Field(
        0.5,
        allow_inf_nan=False,
        description=(
            "for correct_incorrect: reward from which a response counts as correct where the critic says no more"
        ),
    )
    near_duplicate: float = Field(
        1.0, gt=0, le=1, description="responses at least this much alike (0 to 1) count as one; 1: identical ones only"
    )
    max_length_ratio: float | None = Field(
        None, ge=1, description="drop pairs whose responses differ in length by more than this factor; empty: any"
    )
    keep_truncated: bool = Field(False, description="let responses cut at max_new_tokens into pairs")
    balance_lengths: float | None = Field(
        None,
        ge=0,
        description=(
            "drop the most lopsided pairs until the mean log(chosen/rejected length) is within +- this (or the next"
            " would tip it over); empty: keep all"
        ),
    )
    replay_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of a round's pairs that are replayed from earlier rounds (0.2: a fifth)"
    )
    replay_order: Literal["hardest", "random"] = Field(
        "hardest", description="which earlier pairs are replayed: those with the smallest margins, or any"
    )


@dataclass(frozen=True)
class Chosen:
    """The pairs of one question, the best first, and what was left out.

    `dropped_responses` and `dropped_pairs` count by reason. `why_none` says in a few words why there is no pair, None
    if there is one.
    """

    pairs: list[PairChoice]
    dropped_responses: Counter[str] = field(default_factory=Counter)
    dropped_pairs: Counter[str] = field(default_factory=Counter)
    why_none: str | None = None


@dataclass(frozen=True)
class _Question:
    rewards: dict[int, float]
    correct: dict[int, bool | None]
    lengths: Sequence[int]


def choose_pairs(
    rewards: Sequence[float | None],
    responses: Sequence[str],
    settings: PairSettings | None = None,
    *,
    excluded: Mapping[int, str] | None = None,
    correct: Sequence[bool | None] | None = None,
    lengths: Sequence[int] | None = None,
) -> Chosen:
    """Make one question's pairs.

    `excluded` names responses that may not be used, with the reason ("truncated"). `correct` says which responses
    agree with the reference answer, for `correct_incorrect`. `lengths` defaults to numbers of characters.

    >>> choose_pairs([2.0, None, -2.0, 0.0], ["a", "b", "c", "d"]).pairs
    [PairChoice(chosen=0, rejected=2, margin=4.0)]
    """
    settings = settings or PairSettings()
    usable, dropped_responses = _usable(rewards, responses, settings, excluded or {})
    lengths = lengths if lengths is not None else [len(text) for text in responses]
    flags = correct if correct is not None else [r is not None and r >= settings.correct_threshold for r in rewards]
    question = _Question(usable, {index: flags[index] for index in usable}, lengths)
    ordered = [_ordered(question.rewards, one, other) for one, other in combinations(sorted(usable), 2)]
    dropped_pairs: Counter[str] = Counter()
    candidates = []
    for pair in ordered:
        reason = _why_not(pair, question, settings)
        if reason is None:
            candidates.append(pair)
        else:
            dropped_pairs[reason] += 1
    picked = STRATEGIES[settings.strategy](candidates, question, settings)
    dropped_pairs[NOT_IN_STRATEGY] += len(candidates) - len(picked)
    pairs = picked[: settings.max_per_question]
    dropped_pairs[OVER_LIMIT] += len(picked) - len(pairs)
    dropped_pairs = +dropped_pairs
    return Chosen(pairs, dropped_responses, dropped_pairs, None if pairs else _why_none(usable, dropped_pairs))


def _usable(
    rewards: Sequence[float | None], responses: Sequence[str], settings: PairSettings, excluded: Mapping[int, str]
) -> tuple[dict[int, float], Counter[str]]:
    """Rewards of the responses that may take part, by index, and how many were left out why."""
    assert len(rewards) == len(responses)
    dropped: Counter[str] = Counter()
    usable: dict[int, float] = {}
    seen: set[str] = set()
    limit = settings.near_duplicate
    for index, (reward, text) in enumerate(zip(rewards, responses, strict=True)):
        if index in excluded:
            dropped[excluded[index]] += 1
        elif reward is None or not math.isfinite(reward):
            dropped[UNSCORED] += 1
        elif (plain := normalise(text)) in seen:
            dropped[SAME_TEXT] += 1
        elif limit < 1 and any(similarity(text, responses[other]) >= limit for other in usable):
            dropped[NEAR_DUPLICATE] += 1
        else:
            usable[index] = reward
            seen.add(plain)
    return usable, dropped


def _ordered(rewards: Mapping[int, float], one: int, other: int) -> PairChoice:
    if rewards[one] >= rewards[other]:
        return PairChoice(one, other, rewards[one] - rewards[other])
    return PairChoice(other, one, rewards[other] - rewards[one])


def _why_not(pair: PairChoice, question: _Question, settings: PairSettings) -> str | None:
    if settings.strategy == "correct_incorrect":
        better, worse = question.correct[pair.chosen], question.correct[pair.rejected]
        if better is None or worse is None:
            return NO_CORRECTNESS
        if better == worse:
            return BOTH_SAME
        if worse and pair.margin > 0:
            return DISAGREES
    if pair.margin <= 0:
        return TIED
    if pair.margin < settings.min_margin:
        return BELOW_MARGIN
    # best_worst keeps to its one pair; another pair of fitting lengths would no longer be best against worst.
    if not _lengths_fit(question.lengths[pair.chosen], question.lengths[pair.rejected], settings.max_length_ratio):
        return LENGTHS_DIFFER
    return None


def _lengths_fit(one: int, other: int, limit: float | None) -> bool:
    return limit is None or max(one, other) <= limit * min(one, other)


def _why_none(usable: Mapping[int, float], dropped_pairs: Counter[str]) -> str:
    if len(usable) < 2:
        return "fewer than two usable responses"
    if set(dropped_pairs) == {TIED}:
        return "all rewards tied"
    reasons = [reason for reason, _ in dropped_pairs.most_common() if reason != NOT_IN_STRATEGY]
    return reasons[0] if reasons else NOT_IN_STRATEGY


Strategy = Callable[[list[PairChoice], _Question, PairSettings], list[PairChoice]]


def _widest_first(pair: PairChoice) -> tuple[float, int, int]:
    return (-pair.margin, pair.chosen, pair.rejected)


def _best_worst(candidates: list[PairChoice], question: _Question, settings: PairSettings) -> list[PairChoice]:
    """The highest against the lowest reward (LLaVA-Critic); of equals the earlier response."""
    if not question.rewards:
        return []
    widest = max(question.rewards.values()) - min(question.rewards.values())
    return sorted((pair for pair in candidates if pair.margin == widest), key=_widest_first)[:1]


def _topk_bottomk(candidates: list[PairChoice], question: _Question, settings: PairSettings) -> list[PairChoice]:
    """Each of the k best against each of the k worst; with fewer than 2k responses the middle one is left out."""
    ranked = sorted(question.rewards, key=lambda index: (-question.rewards[index], index))
    k = min(settings.top_k_pairs, len(ranked) // 2)
    top, bottom = set(ranked[:k]), set(ranked[len(ranked) - k :])
    return sorted((pair for pair in candidates if pair.chosen in top and pair.rejected in bottom), key=_widest_first)


def _all_above_margin(candidates: list[PairChoice], question: _Question, settings: PairSettings) -> list[PairChoice]:
    return sorted(candidates, key=_widest_first)


def _closest_above_margin(
    candidates: list[PairChoice], question: _Question, settings: PairSettings
) -> list[PairChoice]:
    """The hardest pairs first: those just above the margin."""
    return sorted(candidates, key=lambda pair: (pair.margin, pair.chosen, pair.rejected))


def _correct_incorrect(candidates: list[PairChoice], question: _Question, settings: PairSettings) -> list[PairChoice]:
    """Correct against wrong (MMPR), in an order that uses every response once before any on its side twice.

    Along the diagonal of the table of correct and wrong ones, round its edges, one step aside whenever it closes.
    """
    correct = sorted({pair.chosen for pair in candidates})
    wrong = sorted({pair.rejected for pair in candidates})
    closes = math.lcm(len(correct), len(wrong))
    steps = range(len(correct) * len(wrong))
    places = {(correct[n % len(correct)], wrong[(n + n // closes) % len(wrong)]): n for n in steps}
    return sorted(candidates, key=lambda pair: places[pair.chosen, pair.rejected])


STRATEGIES: dict[str, Strategy] = {
    "best_worst": _best_worst,
    "topk_bottomk": _topk_bottomk,
    "all_above_margin": _all_above_margin,
    "closest_above_margin": _closest_above_margin,
    "correct_incorrect": _correct_incorrect,
}
