"""A critic and a question in; what the critic would ask a model about it, in tokens, out. No model is asked.

The critic itself is run, with somebody who answers anything and counts: so every kind, prompt and panel is counted as
it will ask. A tournament's later rounds depend on the answers; all here are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.engines.prompts import Prompter, PromptTree
from align.plan.times import BranchedSize
from reward.judge_model import BranchedPrompt


class CountingModel:
    """Answers every prompt, and keeps its size. `written_tokens`: how long an answer is, where one is written."""

    def __init__(self, prompter: Prompter, written_tokens: int) -> None:
        self.prompter = prompter
        self.written_tokens = written_tokens
        self.asked: list[BranchedSize] = []

    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[Any]:
        """Counts what was asked; returns equal log-probabilities."""
        self.asked += [self._size(branched, 0) for branched in prompts]
        return [
            np.full((len(branched.branches), len(branched.options)), math.log(1 / len(branched.options)))
            for branched in prompts
        ]

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        """Counts what was asked; returns no text."""
        written = min(self.written_tokens, max_new_tokens)
        self.asked += [self._size(branched, written) for branched in prompts]
        return [["- one claim\n- another claim"] * len(branched.branches) for branched in prompts]

    def _size(self, branched: BranchedPrompt, new_tokens: int) -> BranchedSize:
        tree = self.prompter.build_tree(branched)
        prompt = len(self.prompter.tokenizer(tree.prompt, add_special_tokens=False)["input_ids"])
        groups = _group_lengths(tree)
        longer = sum(len(option) - 1 for option in tree.options) * len(tree.leaf_segments)
        return BranchedSize(
            # The template's one placeholder an image is a visual token itself.
            prompt_tokens=prompt - len(branched.images),
            segment_tokens=sum(groups) + longer,
            groups=len(groups),
            group_tokens=max(groups) + longer // len(groups),
            branches=len(tree.leaf_segments),
            read_tokens=sum(map(len, tree.options)) * len(tree.leaf_segments),
            new_tokens=new_tokens,
        )


class CountingScorer:
    """Scores every dialogue, and counts them."""

    def __init__(self) -> None:
        self.scored = 0

    def __call__(self, dialogues: Sequence[Any]) -> list[float | None]:
        self.scored += len(dialogues)
        return [0.0] * len(dialogues)


def _group_lengths(tree: PromptTree) -> list[int]:
    """Tokens below each child of the prompt."""
    top: list[int] = []
    lengths: dict[int, int] = {}
    for index, segment in enumerate(tree.segments):
        top.append(index if segment.parent is None else top[segment.parent])
        lengths[top[index]] = lengths.get(top[index], 0) + len(segment.token_ids)
    return list(lengths.values())
