"""The control: random preferences, the same for the same item whatever the order of items."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from reward.critics.base import (
    NOTHING_TO_COMPARE,
    BaseCritic,
    Item,
    Judgement,
    broadcast_to_duplicates,
    distinct_responses,
)
from reward.judgement import all_unscored


class RandomCritic(BaseCritic):
    """Puts the distinct responses of an item in a random order, seeded by the item's id.

    The rewards are those that win minus loss would give for that order, so as many pairs survive as a decided critic
    would leave. It makes no verdicts: there is nothing behind them.
    """

    seed: int = 0

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        return [self._judge_one(item) for item in items]

    def _judge_one(self, item: Item) -> Judgement:
        responses = distinct_responses(item)
        if len(responses) < 2:
            return all_unscored(item, NOTHING_TO_COMPARE)
        order = shuffled(responses, f"{self.seed}:{item.id}")
        top = len(order) - 1
        rewards, unscored = broadcast_to_duplicates(
            item, {index: 2.0 * (top - 2 * rank) for rank, index in enumerate(order)}, {}
        )
        return Judgement(id=item.id, rewards=rewards, unscored=unscored)


def shuffled(indices: Sequence[int], key: str) -> list[int]:
    """A random order that depends on the key alone (not on Python's salted hash)."""
    order = list(indices)
    random.Random(hashlib.sha256(key.encode()).digest()).shuffle(order)
    return order
