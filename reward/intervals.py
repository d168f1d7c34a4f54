"""Counts in, 95 % intervals out that hold for few of them: Wilson's for shares, Fisher's for correlations.

Comparisons within a question are not independent. A share over questions therefore counts as many trials as its spread
between questions shows (the effective sample size of survey statistics; Dean and Pagano 2015 compare such intervals).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval; `count` is the number of questions (or trials) behind it."""

    mean: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float]:
        """By the names of the fields."""
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def normal_quantile(level: float) -> float:
    """How many standard errors a two-sided interval of this level reaches to either side."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: int, total: int, *, level: float = 0.95) -> Interval:
    """A proportion with its Wilson score interval (Wilson 1927), which stays inside [0, 1] even for 0 of n.

    Raises:
        ValueError: `total` is not positive, or `successes` lies outside [0, total].

    >>> wilson(0, 10).low, round(wilson(0, 7).high, 2)
    (0.0, 0.35)
    """
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"expected 0 <= successes <= total and total > 0, found {successes} of {total}")
    share = successes / total
    return Interval(share, *wilson_bounds(share, total, level=level), total)


def wilson_bounds(share: float, trials: float, *, level: float = 0.95) -> tuple[float, float]:
    """The ends of Wilson's interval around a share of `trials`, which need not be whole (see `clustered_share`)."""
    z = normal_quantile(level)
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if share <= 0 else max(0.0, centre - half)
    high = 1.0 if share >= 1 else min(1.0, centre + half)
    return low, high


def clustered_share(sums: Sequence[float], sizes: Sequence[int], *, level: float = 0.95) -> Interval:
    """The share `sum(sums) / sum(sizes)` over questions with `sizes` comparisons each; `count` is their number.

    Wilson's interval at the number of independent comparisons that would spread as much as the questions do (at most
    all of them); where nothing spreads, each question counts once.

    Raises:
        ValueError: no comparison at all.

    >>> clustered_share([0, 0, 0], [6, 6, 6]).high == wilson(0, 3).high
    True
    """
    rows = [(float(part), size) for part, size in zip(sums, sizes, strict=True) if size]
    total = sum(size for _, size in rows)
    if not total:
        raise ValueError("no comparison to take a share of")
    share = math.fsum(part for part, _ in rows) / total
    number = len(rows)
    squares = math.fsum((part - share * size) ** 2 for part, size in rows)
    # The variance of a ratio over questions, by its linear part.
    variance = squares / total**2 * number / (number - 1) if number > 1 else share * (1 - share)
    trials = min(max(share * (1 - share) / variance, 1.0), float(total)) if variance > 1e-15 else float(number)
    return Interval(share, *wilson_bounds(share, trials, level=level), total)


def correlation_bounds(correlation: float, degrees: int, *, level: float = 0.95) -> tuple[float, float] | None:
    """Fisher's interval around a correlation of `degrees` + 1 independent points (Fisher 1915); None below 4 points.

    >>> low, high = correlation_bounds(0.0, 102)
    >>> round(high, 3), low == -high
    (0.194, True)
    """
    if degrees < 3:
        return None
    middle, half = (
        math.atanh(min(max(correlation, -1 + 1e-9), 1 - 1e-9)),
        normal_quantile(level) / math.sqrt(degrees - 2),
    )
    return math.tanh(middle - half), math.tanh(middle + half)
