"""A question's responses so far in, how many further ones to draw out: none once two of them can make a pair.

Two responses can make a pair where both are complete, neither is empty, and they differ by more than case, spaces and
punctuation. What a critic thinks of them is not asked: it may still find them equally good.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from align.config import SampleSettings
from reward.texts import normalise

if TYPE_CHECKING:
    from align.engines.base import FurtherSamples


def can_make_pair(responses: Iterable[tuple[str, str]]) -> bool:
    """Whether two of these `(text, finish_reason)` are complete and different.

    >>> can_make_pair([("A cup.", "stop"), ("a cup", "stop"), ("", "stop"), ("A mug and", "length")])
    False
    >>> can_make_pair([("A cup.", "stop"), ("A mug.", "stop")])
    True
    """
    return len({normalise(text) for text, reason in responses if reason == "stop"} - {""}) > 1


def num_further(num_drawn: int, settings: SampleSettings) -> int:
    """How many responses to draw next to a question without a pair: one, then as many as were added so far.

    So hardly more are drawn than needed, in few turns.

    >>> settings = SampleSettings(num_responses=5, until_pair=True, max_responses=16)
    >>> [num_further(drawn, settings) for drawn in (5, 6, 7, 9, 13, 16)]
    [1, 1, 2, 4, 3, 0]
    """
    return min(max(1, num_drawn - settings.num_responses), max(0, settings.max_responses - num_drawn))


def further_samples(settings: SampleSettings) -> FurtherSamples | None:
    """What an engine is to draw beyond `num_responses`; None without until_pair."""
    from align.engines.base import FurtherSamples, SampleResult

    if not settings.until_pair:
        return None

    def wanted(result: SampleResult) -> int:
        paired = can_make_pair(zip(result.texts, result.finish_reasons, strict=True))
        return 0 if paired else num_further(len(result.texts), settings)

    return FurtherSamples(wanted, settings.further_temperature)
