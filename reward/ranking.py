"""Verdicts in, rewards out: win minus loss, Bradley-Terry.

`i` beats `j` means: the verdict's winner is `i`. A soft verdict counts by its probabilities instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reward.judgement import Verdict

MIN_RIDGE = 1e-9


def score_of(verdict: Verdict, *, soft: bool = False) -> float:
    """What the response shown first gains (and the second loses) by a verdict, -1 to 1.

    >>> verdict = Verdict(first=0, second=1, p_first=0.7, p_second=0.3, winner=0)
    >>> score_of(verdict), round(score_of(verdict, soft=True), 2)
    (1.0, 0.4)
    """
    if soft:
        return verdict.p_first - verdict.p_second
    if verdict.winner is None:
        return 0.0
    return 1.0 if verdict.winner == verdict.first else -1.0


def win_minus_loss(
    num_responses: int, verdicts: Iterable[Verdict], *, soft: bool = False, scale_to_all: bool = False
) -> list[float]:
    """Times preferred minus times another was preferred, over all verdicts in both orders (LLaVA-Critic).

    A critic that always prefers the first position gives every response 0, because both orders are summed. With
    `scale_to_all` a response's sum is stretched to the `2 (n - 1)` comparisons that it would have had if all `n`
    compared responses had met, so that margins of a tournament mean the same as those of all pairs.

    >>> forth = Verdict(first=0, second=1, p_first=0.9, p_second=0.1, winner=0)
    >>> back = Verdict(first=1, second=0, p_first=0.6, p_second=0.4, winner=1)
    >>> win_minus_loss(3, [forth, back])
    [0.0, 0.0, 0.0]
    """
    sums, counts = [0.0] * num_responses, [0] * num_responses
    for verdict in verdicts:
        gain = score_of(verdict, soft=soft)
        sums[verdict.first] += gain
        sums[verdict.second] -= gain
        counts[verdict.first] += 1
        counts[verdict.second] += 1
    if not scale_to_all:
        return sums
    full = 2 * (sum(count > 0 for count in counts) - 1)
    return [total * full / count if count else total for total, count in zip(sums, counts, strict=True)]


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths in log-odds (they sum to 0) and their standard errors against that mean."""

    strengths: list[float]
    standard_errors: list[float]


def bradley_terry(
    num_responses: int,
    verdicts: Iterable[Verdict],
    *,
    soft: bool = False,
    ridge: float = 0.1,
    max_steps: int = 100,
    tolerance: float = 1e-10,
) -> BradleyTerry:
    """Maximise sum of w_ij log sigmoid(s_i - s_j) - ridge / 2 |s|^2 by Newton's method (Bradley and Terry, 1952).

    `w_ij` are wins of `i` over `j`, a tie half a win for each. The ridge is a normal prior of variance `1 / ridge`
    on every strength: it keeps a response that won always finite, and one that was never compared at 0 with a large
    error.

    Raises:
        ValueError: `ridge` is below `MIN_RIDGE`, where the equations cannot be solved in floating point.

    >>> won = Verdict(first=0, second=1, p_first=0.9, p_second=0.1, winner=0)
    >>> bradley_terry(2, [won]).strengths[0] > 0
    True
    """
    if not MIN_RIDGE <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number from {MIN_RIDGE:g} on, found {ridge}")
    wins = _win_table(num_responses, verdicts, soft=soft)
    strengths = np.zeros(num_responses)
    for _ in range(max_steps):
        gradient, curvature = _slopes(wins, strengths, ridge)
        step = np.linalg.solve(curvature, gradient)
        # Newton's full step can overshoot where the sigmoid is flat; one unit of log-odds a step cannot.
        step /= max(1.0, float(np.abs(step).max(initial=0.0)))
        strengths += step
        if np.abs(step).max(initial=0.0) < tolerance:
            break
    _, curvature = _slopes(wins, strengths, ridge)
    centre = np.eye(num_responses) - 1.0 / max(num_responses, 1)
    variances = np.diag(centre @ np.linalg.inv(curvature) @ centre)
    return BradleyTerry(strengths.tolist(), np.sqrt(np.maximum(variances, 0.0)).tolist())


def _win_table(num_responses: int, verdicts: Iterable[Verdict], *, soft: bool) -> np.ndarray:
    wins = np.zeros((num_responses, num_responses))
    for verdict in verdicts:
        share = (1.0 + score_of(verdict, soft=soft)) / 2.0
        wins[verdict.first, verdict.second] += share
        wins[verdict.second, verdict.first] += 1.0 - share
    return wins


def _slopes(wins: np.ndarray, strengths: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradient `(n,)` and negative Hessian `(n, n)` of the penalised log-likelihood."""
    odds = 1.0 / (1.0 + np.exp(-(strengths[:, None] - strengths[None, :])))
    matches = wins + wins.T
    gradient = (wins - matches * odds).sum(axis=1) - ridge * strengths
    weights = matches * odds * (1.0 - odds)
    return gradient, np.diag(weights.sum(axis=1) + ridge) - weights


def without_failures(responses: Sequence[int], failed: Mapping[tuple[int, int], str]) -> dict[int, str]:
    """Which responses to leave unscored (index -> reason) so that no failed comparison is left among the others.

    A sum of wins is comparable only between responses with the same opponents, so the response with the most failed
    comparisons goes first (the later one if equal), until none is left.

    >>> without_failures([0, 1, 2], {(0, 2): "timeout", (2, 1): "timeout"})
    {2: 'timeout'}
    """
    left, dropped = dict(failed), {}
    while left:
        counts = Counter(index for pair in left for index in pair)
        worst = max(responses, key=lambda index: (counts[index], index))
        dropped[worst] = next(reason for pair, reason in left.items() if worst in pair)
        left = {pair: reason for pair, reason in left.items() if worst not in pair}
    return dropped


def both_orders(verdicts_by_item: Iterable[Sequence[Verdict]]) -> Iterable[tuple[Verdict, Verdict]]:
    """The two verdicts of every pair that was judged in both orders, smaller index first in the first one."""
    for verdicts in verdicts_by_item:
        table = {(verdict.first, verdict.second): verdict for verdict in verdicts}
        for (first, second), verdict in table.items():
            if first < second and (second, first) in table:
                yield verdict, table[second, first]


def sign(rewards: Sequence[float | None], pair: tuple[int, int]) -> int | None:
    """Which of two responses has the higher reward: 1 the first, -1 the second, 0 neither; None if not known."""
    one, other = rewards[pair[0]], rewards[pair[1]]
    return None if one is None or other is None else (one > other) - (one < other)
