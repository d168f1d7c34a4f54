"""What a critic asks of a model (LLM-as-a-judge): branched prompts in, log-probabilities or texts out.

A critic never sees a tokenizer, a tensor or a network; whatever answers a `BranchedPrompt` is a `JudgeModel`. The shape
of a `BranchedPrompt` is what makes comparison cheap: all that the branches have in common stands in front, so that an
engine may encode it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class BranchedPrompt:
    """One user turn with several branches, and the answers between which the model chooses.

    The turn of branch `b` is `images`, then `head + "".join(branches[b]) + tail`. Equal leading pieces of several
    branches (the same first response, say) may be encoded once and shared; so may `images` and `head`.
    `images` are opaque handles, handed through unchanged. `options` are the texts with which the assistant's turn
    may begin; it is empty where the model is asked to generate.
    """

    images: tuple[Any, ...]
    system: str | None
    head: str
    branches: tuple[tuple[str, ...], ...]
    tail: str
    options: tuple[str, ...]

    def turn(self, branch: int) -> str:
        """The text of one branch's user turn, images left out.

        >>> prompt = BranchedPrompt((), None, "Which? ", (("a ", "b "), ("a ", "c ")), "Answer:", ("1", "2"))
        >>> prompt.turn(1)
        'Which? a c Answer:'
        """
        return self.head + "".join(self.branches[branch]) + self.tail


class JudgeModel(Protocol):
    """Answers prompts: a local model, a server, or a rule in a test."""

    def log_probs(self, prompts: Sequence[BranchedPrompt]) -> list[Any]:
        """Per prompt an array `(num_branches, num_options)` of natural-log probabilities.

        A value is the log-probability of the whole option as the beginning of the assistant's turn; options are
        not normalised against each other. `nan` where the engine failed (a row of `nan`: that branch failed).
        """
        ...

    def generate(self, prompts: Sequence[BranchedPrompt], *, max_new_tokens: int) -> list[list[str | None]]:
        """Per prompt and branch the generated text (greedy); `None` where it failed or timed out."""
        ...
