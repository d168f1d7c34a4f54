"""Pairs of all questions in; which of them to train on out: length balance, and replay of earlier rounds' pairs.

Works on numbers only and returns indices, so that it does not matter how pairs are stored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from reward.errors import RewardError


def mean_log_ratio(lengths: Sequence[tuple[int, int]]) -> float | None:
    """Mean of log(chosen length / rejected length): 0 if neither side is longer, None without pairs.

    >>> mean_log_ratio([(10, 20), (20, 10)])
    0.0
    """
    return sum(map(_log_ratio, lengths)) / len(lengths) if lengths else None


def _log_ratio(lengths: tuple[int, int]) -> float:
    chosen, rejected = lengths
    return math.log(max(chosen, 1) / max(rejected, 1))


def balance_lengths(lengths: Sequence[tuple[int, int]], *, limit: float) -> list[int]:
    """Indices of the pairs to keep so that the mean log ratio of (chosen, rejected) lengths is within +-limit.

    The pair that leans furthest towards the heavier side goes first, until the limit is kept or without the next one
    the rest would lean as far to the other side. `limit` 0.1 means that chosen responses may be about 10 % longer or
    shorter on (geometric) average.

    >>> balance_lengths([(80, 10), (20, 10), (10, 20)], limit=0.1)
    [1, 2]
    """
    if limit < 0:
        raise RewardError(f"the limit on the length ratio must not be negative, found {limit}")
    ratios = [_log_ratio(pair) for pair in lengths]
    order = sorted(range(len(ratios)), key=lambda index: (ratios[index], index))
    start, end, total = 0, len(order), math.fsum(ratios)
    while start < end and abs(total) > limit * (end - start):
        rest = total - ratios[order[end - 1] if total > 0 else order[start]]
        if rest * total < 0 and abs(rest) * (end - start) >= abs(total) * (end - start - 1):
            break
        start, end, total = (start, end - 1, rest) if total > 0 else (start + 1, end, rest)
    return sorted(order[start:end])


def draw_replay(
    num_new: int, margins: Sequence[float], *, fraction: float, order: str = "hardest", seed: int = 0
) -> list[int]:
    """Indices of earlier rounds' pairs to add to `num_new` new ones, so that they make up `fraction` of all (0 to 1).

    `hardest` takes the smallest margins first, `random` any; of equals a seeded draw. Fewer if there are not enough.

    >>> draw_replay(6, [4.0, 1.0, 8.0, 2.0], fraction=0.25)
    [1, 3]
    """
    if not 0 <= fraction < 1:
        raise RewardError(f"the fraction of replayed pairs must be at least 0 and below 1, found {fraction}")
    if order not in ("hardest", "random"):
        raise RewardError(f"the order of replayed pairs must be hardest or random, found {order!r}")
    num_replayed = min(round(num_new * fraction / (1 - fraction)), len(margins))
    indices = list(range(len(margins)))
    random.Random(seed).shuffle(indices)
    if order == "hardest":
        indices.sort(key=lambda index: margins[index])
    return sorted(indices[:num_replayed])
