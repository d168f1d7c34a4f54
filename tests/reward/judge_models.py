"""Judge models that answer from a rule: real implementations of the protocol,
small enough to know what must come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reward.judge_model import BranchedPrompt

# What stands before each response in the built-in pairwise prompts.
FIRST, SECOND, END = "The first response: [", "]\nThe second response: [", "]"


def two_responses(turn: str) -> tuple[str, str]:
    """The two responses shown in a turn made by the built-in pairwise prompts."""
    first, rest = turn.split(FIRST, 1)[1].split(SECOND, 1)
    return first, rest.split(END, 1)[0]


class QualityModel:
    """Prefers the response with the higher quality; the probability is the logistic of the difference.

    `quality(image, response)`; `lean` is added in favour of whatever stands first. Options are in the prompts'
    order: first, second, and perhaps tie, which gets a fixed share where `tie_below` exceeds the difference.
    """

    def __init__(
        self, quality: Callable[[Any, str], float], *, lean: float = 0.0, tie_below: float = 0.0, mass: float = 1.0
    ) -> None:
        self.quality, self.lean, self.tie_below, self.mass = quality, lean, tie_below, mass
        self.num_branches = 0

    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[Any]:
        return [np.array([self._row(prompt, branch) for branch in range(len(prompt.branches))]) for prompt in prompts]

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        return [
            [prompt.options[int(np.argmax(row))] + ", because it is so." for row in table]
            for prompt, table in zip(prompts, self.log_probs(prompts), strict=True)
        ]

    def _row(self, prompt: BranchedPrompt, branch: int) -> list[float]:
        self.num_branches += 1
        image = prompt.images[0] if prompt.images else None
        first, second = two_responses(prompt.turn(branch))
        difference = self.quality(image, first) - self.quality(image, second) + self.lean
        p_first = 1 / (1 + math.exp(-difference))
        shares = [p_first, 1 - p_first]
        if len(prompt.options) == 3:
            tie = 0.9 if abs(difference) < self.tie_below else 0.01
            shares = [share * (1 - tie) for share in shares] + [tie]
        return [math.log(share * self.mass) if share else -math.inf for share in shares]


class FunctionModel:
    """Answers every branch from a function of its turn: a row of log-probabilities, or a text."""

    def __init__(
        self, row: Callable[[str], Sequence[float]] | None = None, text: Callable[[str], str | None] | None = None
    ) -> None:
        self.row, self.text = row, text
        self.prompts: list[BranchedPrompt] = []

    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[Any]:
        assert self.row is not None
        self.prompts += prompts
        return [
            np.array([self.row(prompt.turn(branch)) for branch in range(len(prompt.branches))]) for prompt in prompts
        ]

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        assert self.text is not None
        self.prompts += prompts
        return [[self.text(prompt.turn(branch)) for branch in range(len(prompt.branches))] for prompt in prompts]
