"""Logits and uniform numbers in, chosen tokens out: temperature, top-k and top-p as in transformers' generate.

A sample's numbers come from its own counter-based stream, so what it says depends on its seed and index alone: not on
the order of questions, the batch, or how many other samples are drawn beside it. Choosing is by inverse distribution
function in double precision, over the tokens that the settings keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.engines.base import SamplingSettings
from align.errors import UserError

# The nucleus nearly always lies within this many likeliest tokens; where it does not, all are sorted.
NUCLEUS_GUESS = 512


def uniforms(seeds: Sequence[int], num_samples: int, num_steps: int) -> Tensor:
    """`(len(seeds), num_samples, num_steps)` float64 in [0, 1): one Philox stream for every seed and sample index.

    A stream begins in the same way however long it is and however many stand beside it.

    >>> bool((uniforms([7, 8], 3, 4)[1, 2, :2] == uniforms([8], 5, 2)[0, 2]).all())
    True
    """
    numbers = np.empty((len(seeds), num_samples, num_steps))
    for row, seed in enumerate(seeds):
        for index in range(num_samples):
            key = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=16).digest()
            stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            numbers[row, index] = stream.random(num_steps)
    return torch.from_numpy(numbers)


def choose(logits: Tensor, settings: SamplingSettings, uniform: Tensor | None) -> Tensor:
    """Tokens `(N,)` int64 from fp32 logits `(N, V)` and `(N,)` numbers in [0, 1); greedy at temperature 0.

    The order is that of generate: temperature, then top-k, then top-p of what is left. Of top-p, the tokens are kept
    before which, in falling order, less than `top_p` of the probability stands; so at least one is.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    assert uniform is not None
    scores = logits / settings.temperature
    ids = None
    if 0 < settings.top_k < scores.shape[-1]:
        scores, ids = scores.topk(settings.top_k, dim=-1)
    if settings.top_p < 1.0:
        scores, ids = _nucleus(scores, ids, settings.top_p)
    mass = scores.softmax(dim=-1).double().cumsum(dim=-1)
    # A uniform number just below 1 may round up to the whole mass: stay on the last token that has any.
    last = (mass < mass[:, -1:]).sum(dim=-1, keepdim=True)
    picked = torch.searchsorted(mass, uniform.to(mass)[:, None] * mass[:, -1:], right=True).minimum(last)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


def _nucleus(scores: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in falling order, `(N, M)` scores and ids; those outside of the nucleus have -inf."""
    probabilities = scores.softmax(dim=-1)
    count = scores.shape[-1] if ids is not None else min(NUCLEUS_GUESS, scores.shape[-1])
    top, order = probabilities.topk(count, dim=-1)
    before = top.cumsum(dim=-1) - top
    if count < scores.shape[-1] and bool((before[:, -1] < top_p).any()):
        top, order = probabilities.sort(dim=-1, descending=True)
        before = top.cumsum(dim=-1) - top
    kept = scores.gather(1, order).masked_fill(before >= top_p, float("-inf"))
    return kept, order if ids is None else ids.gather(1, order)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits `(N, V)` of tokens `seen` `(N, V)` bool divided by the penalty, or multiplied where negative.

    CTRL (arXiv 1909.05858), as in transformers.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class SeededSampler:
    """Chooses tokens by each branch's own numbers; knows what a branch has said, where repetition is penalised.

    `numbers` `(B, K, steps)`, `prompt_ids` `(B, P)`.
    """

    def __init__(self, settings: SamplingSettings, numbers: Tensor, prompt_ids: Tensor) -> None:
        self.settings = settings
        self.numbers = numbers
        self.prompt_ids = prompt_ids
        self.seen: Tensor | None = None

    def __call__(self, logits: Tensor, row: Tensor, branch: Tensor, step: int) -> Tensor:
        """Tokens `(N,)` for logits `(N, V)` of these rows and branches `(N,)`.

        Raises:
            UserError: there are logits that are not numbers, of which no token could be chosen.
        """
        if self.settings.repetition_penalty != 1.0:
            if self.seen is None:
                generated_ids = logits.new_zeros(len(self.prompt_ids), logits.shape[-1], dtype=torch.bool)
                generated_ids.scatter_(1, self.prompt_ids, True)
                self.seen = generated_ids[:, None].repeat(1, self.numbers.shape[1], 1)
            logits = penalise_repetition(logits, self.seen[row, branch], self.settings.repetition_penalty)
        if not bool(logits.amax(dim=-1).isfinite().all()):
            raise UserError(
                "the model's logits are not numbers",
                fix="set model.dtype to float32 or bfloat16; where that does not help, the weights are broken",
            )
        tokens = choose(logits, self.settings, self.numbers[row, branch, step])
        if self.seen is not None:
            self.seen[row, branch, tokens] = True
        return tokens
