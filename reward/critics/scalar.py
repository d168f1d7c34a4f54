"""Reward models that give one number: items in; the number for each response, as the reward, out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from reward.critics.base import NO_ANSWER, BaseCritic, Item, Judgement, broadcast_to_duplicates, distinct_responses

NOT_FINITE = "the reward model gave no finite number"


@dataclass(frozen=True)
class Dialogue:
    """One question with one response: what a sequence-classification reward model reads."""

    images: tuple[Any, ...]
    question: str
    response: str


class Scorer(Protocol):
    """A reward model that somebody else loads and batches."""

    def __call__(self, dialogues: Sequence[Dialogue]) -> Sequence[float | None]:
        """One number per dialogue, higher is better; None or nan where it failed."""
        ...


class ScalarCritic(BaseCritic):
    """Takes a reward model's number as it is; only differences within one question mean anything."""

    scorer: Any = Field(exclude=True)

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        responses = [distinct_responses(item) for item in items]
        dialogues = [
            Dialogue(item.images, item.question, item.responses[index])
            for item, indices in zip(items, responses, strict=True)
            for index in indices
        ]
        numbers = list(self.scorer(dialogues)) if dialogues else []
        assert len(numbers) == len(dialogues), f"{len(dialogues)} dialogues, but the scorer gave {len(numbers)} numbers"
        rest = iter(numbers)
        return [
            _judgement(item, {i: next(rest) for i in indices}) for item, indices in zip(items, responses, strict=True)
        ]


def _judgement(item: Item, numbers: dict[int, float | None]) -> Judgement:
    values: dict[int, float] = {}
    unscored: dict[int, str] = {}
    for index, number in numbers.items():
        if number is None:
            unscored[index] = NO_ANSWER
        elif not math.isfinite(number):
            unscored[index] = NOT_FINITE
        else:
            values[index] = float(number)
    rewards, reasons = broadcast_to_duplicates(item, values, unscored)
    return Judgement(id=item.id, rewards=rewards, unscored=reasons)
