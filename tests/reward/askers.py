"""Askers that answer from a rule: real implementations of the protocol, small enough to know what must come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reward.judge_model import Ask

# What stands before each response in the built-in pairwise prompts.
FIRST, SECOND, END = "The first response: [", "]\nThe second response: [", "]"


def two_responses(turn: str) -> tuple[str, str]:
    """The two responses shown in a turn made by the built-in pairwise prompts."""
    first, rest = turn.split(FIRST, 1)[1].split(SECOND, 1)
    return first, rest.split(END, 1)[0]


class QualityAsker:
    """Prefers the response with the higher quality; the probability is the logistic of the difference.

    `quality(image, response)`; `lean` is added in favour of whatever stands first. Options are in the prompts'
    order: first, second, and perhaps tie, which gets a fixed share where `tie_below` exceeds the difference.
    """

    def __init__(
        self, quality: Callable[[Any, str], float], *, lean: float = 0.0, tie_below: float = 0.0, mass: float = 1.0
    ) -> None:
        self.quality, self.lean, self.tie_below, self.mass = quality, lean, tie_below, mass
        self.num_branches = 0

    def log_probs(self, asks: Sequence[Ask]) -> list[Any]:
        return [np.array([self._row(ask, branch) for branch in range(len(ask.branches))]) for ask in asks]

    def generate(self, asks: Sequence[Ask], *, max_new_tokens: int) -> list[list[str | None]]:
        return [
            [ask.options[int(np.argmax(row))] + ", because it is so." for row in table]
            for ask, table in zip(asks, self.log_probs(asks), strict=True)
        ]

    def _row(self, ask: Ask, branch: int) -> list[float]:
        self.num_branches += 1
        image = ask.images[0] if ask.images else None
        first, second = two_responses(ask.turn(branch))
        difference = self.quality(image, first) - self.quality(image, second) + self.lean
        p_first = 1 / (1 + math.exp(-difference))
        shares = [p_first, 1 - p_first]
        if len(ask.options) == 3:
            tie = 0.9 if abs(difference) < self.tie_below else 0.01
            shares = [share * (1 - tie) for share in shares] + [tie]
        return [math.log(share * self.mass) if share else -math.inf for share in shares]


class FunctionAsker:
    """Answers every branch from a function of its turn: a row of log-probabilities, or a text."""

    def __init__(
        self, row: Callable[[str], Sequence[float]] | None = None, text: Callable[[str], str | None] | None = None
    ) -> None:
        self.row, self.text = row, text
        self.asks: list[Ask] = []

    def log_probs(self, asks: Sequence[Ask]) -> list[Any]:
        assert self.row is not None
        self.asks += asks
        return [np.array([self.row(ask.turn(branch)) for branch in range(len(ask.branches))]) for ask in asks]

    def generate(self, asks: Sequence[Ask], *, max_new_tokens: int) -> list[list[str | None]]:
        assert self.text is not None
        self.asks += asks
        return [[self.text(ask.turn(branch)) for branch in range(len(ask.branches))] for ask in asks]
