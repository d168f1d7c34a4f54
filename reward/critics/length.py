"""The control for length: the longer response wins, whatever it says."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from reward.critics.base import (
    NOTHING_TO_COMPARE,
    BaseCritic,
    Item,
    Judgement,
    broadcast_to_duplicates,
    distinct_responses,
)
from reward.judgement import all_unscored


class LengthCritic(BaseCritic):
    """Prefers the response with more characters (spaces at its ends apart), and nothing else.

    A gain that this critic gives as well is a gain of length. The rewards are those that win minus loss would give over
    all ordered pairs; responses of one length are tied. It makes no verdicts: there is nothing behind them.
    """

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        return [self._judge_one(item) for item in items]

    def _judge_one(self, item: Item) -> Judgement:
        responses = distinct_responses(item)
        if len(responses) < 2:
            return all_unscored(item, NOTHING_TO_COMPARE)
        lengths = {index: len(item.responses[index].strip()) for index in responses}
        wins = {index: _wins(length, lengths.values()) for index, length in lengths.items()}
        rewards, unscored = broadcast_to_duplicates(item, wins, {})
        return Judgement(id=item.id, rewards=rewards, unscored=unscored)


def _wins(length: int, all_lengths: Collection[int]) -> float:
    """Comparisons won minus lost, each in both orders.

    >>> [_wins(length, [4, 9, 9]) for length in (4, 9)]
    [-4.0, 2.0]
    """
    return 2.0 * sum((length > other) - (length < other) for other in all_lengths)
