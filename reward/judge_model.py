"""What a critic wants to know of a model: asks (texts, images, options) in, log-probabilities or texts out.

A critic never sees a tokenizer, a tensor or a network; whoever can answer an `Ask` is an `Asker`. The shape of an
`Ask` is what makes comparison cheap: everything that the branches have in common stands in front, so that an engine
may encode it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Ask:
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

        >>> ask = Ask((), None, "Which? ", (("a ", "b "), ("a ", "c ")), "Answer:", ("1", "2"))
        >>> ask.turn(1)
        'Which? a c Answer:'
        """
        return self.head + "".join(self.branches[branch]) + self.tail


class Asker(Protocol):
    """Answers asks: a local model, a server, or a rule in a test."""

    def log_probs(self, asks: Sequence[Ask]) -> list[Any]:
        """Per ask an array `(num_branches, num_options)` of natural-log probabilities.

        A value is the log-probability of the whole option as the beginning of the assistant's turn; options are
        not normalised against each other. `nan` where the engine failed (a row of `nan`: that branch failed).
        """
        ...

    def generate(self, asks: Sequence[Ask], *, max_new_tokens: int) -> list[list[str | None]]:
        """Per ask and branch the generated text (greedy); `None` where it failed or timed out."""
        ...
