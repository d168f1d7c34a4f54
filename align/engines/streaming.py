"""Tokens as they are chosen in, what each sample has said so far out: for a person who reads while a model answers.

It stands around the chooser of a question's samples, so it sees the same on the shared and on the unshared path.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from align.engines.decoding import Sampler


class Stopped(BaseException):
    """Raised by a watcher to end the sampling it watches. No fault, so nothing that handles faults may catch it."""


class StreamingSampler:
    """A chooser for the samples of one question that tells `on_step` after every step what each has said.

    The end token is told too, and nothing that is chosen behind it. Step 0 begins anew: where the shared prefix turns out not
    to be exact, the question is answered a second time.

    >>> import torch
    >>> told = []
    >>> watched = StreamingSampler(lambda logits, *_: logits.argmax(dim=-1), [2], told.append)
    >>> for step, logits in enumerate(([[0, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 0, 0]])):
    ...     _ = watched(torch.tensor(logits), torch.tensor([0, 0]), torch.tensor([0, 1]), step)
    >>> told
    [[[1], [2]], [[1, 0], [2]]]
    """

    def __init__(self, choose: Sampler, eos: list[int], on_step: Callable[[list[list[int]]], None]) -> None:
        self.choose = choose
        self.eos = frozenset(eos)
        self.on_step = on_step
        self.generated_ids: list[list[int]] = []

    def __call__(self, logits: Tensor, row: Tensor, branch: Tensor, step: int) -> Tensor:
        tokens = self.choose(logits, row, branch, step)
        if step == 0:
            self.generated_ids = [[] for _ in range(len(branch))]
        for which, token in zip(branch.tolist(), tokens.tolist(), strict=True):
            if not self.generated_ids[which] or self.generated_ids[which][-1] not in self.eos:
                self.generated_ids[which].append(token)
        self.on_step([list(generated_ids) for generated_ids in self.generated_ids])
        return tokens
