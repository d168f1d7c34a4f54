"""Tokens as they are sampled in, what each sample is so far out: for a person who reads while a model answers.

It stands around the sampler of a question's samples, so it sees the same on the shared and on the unshared path.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from align.engines.sampling import Sampler


class Stopped(BaseException):
    """Raised by who reads a stream to end it. No fault, so nothing that handles faults may catch it."""


class StreamingSampler:
    """A sampler for the samples of one question that gives `on_step` after every step the tokens of each so far.

    The end token is given too, and nothing that is sampled behind it. Step 0 starts a sample again: where the shared
    prefix turns out not to be exact, the question is answered a second time.

    >>> import torch
    >>> heard = []
    >>> streaming = StreamingSampler(lambda logits, *_: logits.argmax(dim=-1), [2], heard.append)
    >>> for step, logits in enumerate(([[0, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 0, 0]])):
    ...     _ = streaming(torch.tensor(logits), torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([step, step]))
    >>> heard
    [[[1], [2]], [[1, 0], [2]]]
    """

    def __init__(self, sampler: Sampler, eos: list[int], on_step: Callable[[list[list[int]]], None]) -> None:
        self.sampler = sampler
        self.eos = frozenset(eos)
        self.on_step = on_step
        self.generated_ids: dict[int, list[int]] = {}

    def __call__(self, logits: Tensor, question: Tensor, branch: Tensor, step: Tensor) -> Tensor:
        tokens = self.sampler(logits, question, branch, step)
        for which, token, at in zip(branch.tolist(), tokens.tolist(), step.tolist(), strict=True):
            generated = [] if at == 0 else self.generated_ids[which]
            if not generated or generated[-1] not in self.eos:
                generated.append(token)
            self.generated_ids[which] = generated
        self.on_step([list(self.generated_ids[which]) for which in sorted(self.generated_ids)])
        return tokens
