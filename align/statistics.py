"""Numbers for judging responses: bootstrap intervals, repetition, distinct n-grams, refusals.

Texts and per-question values in, plain floats and `Interval` records out. The question is the unit of resampling
everywhere: responses to one question are not independent, so intervals over single responses would be too narrow.
Wilson's interval, for counts, stands in reward.intervals. Knows nothing of models, files or reports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from reward.intervals import Interval, wilson

Values = Sequence[float] | Sequence[Sequence[float]]
NGRAM = 4


def bootstrap_share(values: Values) -> Interval:
    """`bootstrap_mean` of values from 0 to 1; of a mean of 0 or 1, where nothing can be drawn, Wilson's interval.

    >>> bootstrap_share([0.0] * 7).high == wilson(0, 7).high
    True
    """
    interval = bootstrap_mean(values)
    if interval.mean in (0.0, 1.0):
        return wilson(round(interval.mean * interval.count), interval.count)
    return interval


def bootstrap_mean(values: Values, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """The mean over all values with a percentile interval from resampling whole questions with replacement.

    `values` holds one number per question, or a list of numbers per question (several responses); a question with more
    responses weighs more, as in the plain mean. Questions without a value are left out of mean and count.

    Raises:
        ValueError: no value at all, or one that is not finite.

    >>> bootstrap_mean([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0, count=3)
    """
    return bootstrap_ratio(*_totals(values), seed=seed, resamples=resamples, level=level)


def bootstrap_ratio(
    sums: Sequence[float] | np.ndarray,
    sizes: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """All `sums` over all `sizes` (one of each per question, as of nats and tokens), with an interval as above.

    >>> bootstrap_ratio([1.0, 3.0], [2.0, 6.0]).mean
    0.5
    """
    sums, sizes = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    kept = sizes > 0
    sums, sizes = sums[kept], sizes[kept]
    if not len(sums):
        raise ValueError("no values to average")
    drawn = _resample(np.stack([sums, sizes], axis=1), resamples, seed)
    low, high = _percentiles(drawn[:, 0] / drawn[:, 1], level)
    return Interval(float(sums.sum() / sizes.sum()), low, high, len(sums))


def paired_difference(a: Values, b: Values, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Mean of `b` minus mean of `a` on the same questions, with a paired bootstrap interval.

    Entry i of both belongs to question i. Resampling questions for both sides at once removes the spread between easy
    and hard questions, so the interval is much narrower than that of two independent means. Questions that lack a
    value on either side are left out.

    Raises:
        ValueError: `a` and `b` differ in length, share no question with values, or hold a value that is not finite.

    >>> paired_difference([0.0, 0.0], [1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0, count=2)
    """
    if len(a) != len(b):
        raise ValueError(f"expected values of the same questions, found {len(a)} and {len(b)}")
    sums_a, sizes_a = _totals(a)
    sums_b, sizes_b = _totals(b)
    kept = (sizes_a > 0) & (sizes_b > 0)
    sums_a, sizes_a, sums_b, sizes_b = sums_a[kept], sizes_a[kept], sums_b[kept], sizes_b[kept]
    if not len(sums_a):
        raise ValueError("no question has values on both sides")
    drawn = _resample(np.stack([sums_a, sizes_a, sums_b, sizes_b], axis=1), resamples, seed)
    low, high = _percentiles(drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1], level)
    mean = sums_b.sum() / sizes_b.sum() - sums_a.sum() / sizes_a.sum()
    return Interval(float(mean), low, high, len(sums_a))


def words(text: str) -> list[str]:
    """Words in lower case; text in scripts written without spaces falls into its characters.

    >>> words("A red Bus, 红色")
    ['a', 'red', 'bus', '红', '色']
    """
    return [match.group().lower() for match in _WORD.finditer(text)]


def repetition(text: str) -> float:
    """The share of 4-grams of words that stood earlier in the same text: 0 for fresh text, near 1 for a loop.

    Texts with fewer than five words have no two 4-grams to compare and give 0.

    >>> repetition("one two three four five")
    0.0
    >>> repetition("a b a b a b a b")  # 5 four-grams, 2 different ones
    0.6
    """
    grams = _ngrams(words(text), NGRAM)
    if len(grams) < 2:
        return 0.0
    return 1.0 - len(set(grams)) / len(grams)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different n-grams over all n-grams of all texts together (Li et al. 2016); 0 where no text is n words long.

    >>> distinct_n(["a red bus", "a red car"], 2)
    0.75
    """
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(text: str) -> bool:
    """Whether a response declines to answer, by its first sentence or two (English and Chinese phrases).

    A phrase deep inside a long answer does not count: "I cannot see the driver" is a description.

    >>> is_refusal("I'm sorry, but I can't help with that.")
    True
    >>> is_refusal("A man cannot open the door.")
    False
    """
    head = text.strip()[:200].replace("’", "'").lower()
    return any(pattern.search(head) for pattern in _REFUSALS)


# Han, kana, Hangul and Thai run on without spaces (or with too few); each character counts as a word there.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0002ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’][^\W{_UNSPACED}]+)*")

_REFUSALS = tuple(
    re.compile(pattern)
    for pattern in (
        (
            r"^(?:i'm|i am|we are|we're)?\s*(?:very |so |really )?(?:sorry|afraid)\b[^.!?]{0,40}?\b(?:can't|cannot|can"
            r" not|unable|not able|won't)\b"
        ),
        r"^(?:unfortunately,? |apologies,? (?:but )?|my apologies,? (?:but )?)?i (?:can't|cannot|can not|won't|will"
        r" not|am unable to|am not able to)\s+"
        r"(?:help(?! but)|assist|answer|provide|comply|fulfil|fulfill|do"
        r" that|discuss|engage|identify|support|process|continue)\b",
        (
            r"^(?:unfortunately,? )?i(?:'m| am) (?:unable|not able)"
            r" to\s+(?:help|assist|answer|provide|comply|identify|process|view|see)\b"
        ),
        (
            r"^as an? (?:ai|language model|artificial intelligence)\b[^.!?]{0,60}?\b(?:can't|cannot|unable|not"
            r" able|don't|do not)\b"
        ),
        r"^(?:很|非常|十分)?(?:抱歉|对不起|不好意思)[^。!?！？]{0,20}?(?:无法|不能|没法|没有办法|不便)",
        r"^(?:作为|我是)(?:一个|一名)?(?:ai|人工智能|语言模型)[^。!?！？]{0,30}?(?:无法|不能|没法)",
        r"^我(?:无法|不能|没法)(?:回答|提供|帮助|协助|满足|处理|完成)",
    )
)


def _totals(values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Per question the sum of its values and how many there are, (Q,) float64 both."""
    rows = [[float(value)] if np.isscalar(value) else [float(item) for item in value] for value in values]  # type: ignore[union-attr,arg-type]
    sums = np.array([math.fsum(row) for row in rows], dtype=np.float64)
    if not np.isfinite(sums).all():
        raise ValueError("expected finite values")
    return sums, np.array([len(row) for row in rows], dtype=np.float64)


def _resample(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Column sums (resamples, C) over questions drawn with replacement from `columns` (Q, C)."""
    generator = np.random.default_rng(seed)
    count = len(columns)
    # A block of resamples at a time: 32 MiB at most, whatever the number of questions.
    block = max(1, 4_194_304 // count)
    sums = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(0, count, size=(rows, count)) + np.arange(rows)[:, None] * count
        # How often each question was drawn: a matrix product with counts is faster than gathering what was drawn.
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums.append(times.astype(np.float64) @ columns)
    return np.concatenate(sums)


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
