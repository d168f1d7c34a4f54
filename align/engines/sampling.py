"""Logits and uniform numbers in, chosen tokens out: temperature, top-k and top-p as in transformers' generate.

A sample's numbers come from its own counter-based stream, so what it says depends on its seed and index alone: not on
the order of questions, the batch, or how many other samples are drawn beside it. Choosing is by inverse distribution
function in double precision, over the tokens that the settings keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from align.engines.base import SamplingSettings
from align.errors import UserError

# Gets logits (N, V) and, for each, its question, the index of its branch and how many tokens that has, all (N,); gives
# tokens (N,), below zero where logits are not finite.
Sampler = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The nucleus nearly always lies within this many likeliest tokens; where it does not, all are sorted.
NUCLEUS_GUESS = 512


def uniforms(seeds: Sequence[int], num_samples: int, num_steps: int, *, first: int = 0) -> Tensor:
    """`(len(seeds), num_samples, num_steps)` float64 in [0, 1):
    one Philox stream per seed and sample index from `first` on.

    A stream begins in the same way however long it is and however many stand beside it.

    >>> bool((uniforms([7, 8], 3, 4)[1, 2, :2] == uniforms([8], 5, 2)[0, 2]).all())
    True
    """
    numbers = np.empty((len(seeds), num_samples, num_steps))
    for row, seed in enumerate(seeds):
        for index in range(num_samples):
            key = hashlib.blake2b(f"{seed}/{first + index}".encode(), digest_size=16).digest()
            stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            numbers[row, index] = stream.random(num_steps)
    return torch.from_numpy(numbers)


def choose(
    logits: Tensor, settings: SamplingSettings, uniform: Tensor | None, *, temperatures: Tensor | None = None
) -> Tensor:
    """Tokens `(N,)` int64 from fp32 logits `(N, V)` and `(N,)` numbers in [0, 1); greedy at temperature 0.

    `temperatures` `(N,)` fp32 take the place of one of the settings that is above 0. The order is that of generate:
    temperature, then top-k, then top-p of what is left. Of top-p, the tokens are kept before which, in falling order,
    less than `top_p` of the probability stands; so at least one is.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    assert uniform is not None
    scores = logits / settings.temperature
    if temperatures is not None:
        scores = logits / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    ids = None
    if 0 < settings.top_k < scores.shape[-1]:
        scores, ids = scores.topk(settings.top_k, dim=-1)
    if settings.top_p < 1.0:
        scores, ids = _nucleus(scores, ids, settings.top_p)
    mass = scores.softmax(dim=-1).double().cumsum(dim=-1)
    # A uniform number just below 1 may round up to the whole mass: stay on the last token that has any.
    last = (mass < mass[:, -1:]).sum(dim=-1, keepdim=True)
    picked = torch.searchsorted(mass, uniform.to(mass)[:, None] * mass[:, -1:], right=True).minimum(last)
    tokens = (picked if ids is None else ids.gather(1, picked))[:, 0]
    return tokens if temperatures is None else torch.where(temperatures > 0, tokens, logits.argmax(dim=-1))


def _nucleus(scores: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in falling order, `(N, M)` scores and ids; those outside of the nucleus have -inf."""
    probabilities = scores.softmax(dim=-1)
    # On an accelerator, to see whether the guess is enough would be a wait of the host: there all are sorted.
    guess = NUCLEUS_GUESS if scores.device.type == "cpu" else scores.shape[-1]
    count = scores.shape[-1] if ids is not None else min(guess, scores.shape[-1])
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


def not_finite() -> UserError:
    """What is said of logits of which no token can be sampled."""
    return UserError(
        "the model's logits are not finite (NaN or infinity)",
        fix="set model.dtype to float32 or bfloat16; where that does not help, the weights are broken",
    )


def _with_room(old: Tensor, num_tickets: int, num_branches: int) -> Tensor:
    """A tensor `(tickets, branches, ...)` with at least so many of both; what is new is 0."""
    size = (max(num_tickets, old.shape[0]), max(num_branches, old.shape[1]), *old.shape[2:])
    if old.shape == size:
        return old
    new = old.new_zeros(size)
    new[: old.shape[0], : old.shape[1]] = old
    return new


class SeededSampler:
    """Samples tokens by each branch's own numbers; knows what a branch has said, where repetition is penalised.

    A question is begun under a number of its own, its ticket, that may be used again once the question is finished.
    Samples that are drawn after a question's first ones have `further_temperature`, where it is given. A greedy
    response comes first, as the sample of index -1.
    """

    def __init__(
        self, settings: SamplingSettings, device: torch.device, *, further_temperature: float | None = None
    ) -> None:
        self.settings = settings
        self.device = device
        self.further_temperature = further_temperature
        self.first = -1 if settings.greedy_first else 0
        self._has_one_temperature = further_temperature is None and not settings.greedy_first
        self._temperatures = torch.zeros(0, 0, device=device)
        self._numbers = torch.zeros(0, 0, settings.max_new_tokens, dtype=torch.float64, device=device)
        self._prompt_ids: dict[int, Tensor] = {}
        self._seen: Tensor | None = None

    def begin(self, tickets: Sequence[int], seeds: Sequence[int], num_branches: int, inputs: dict[str, Tensor]) -> None:
        """Begin questions with prompts `input_ids` and `attention_mask` `(n, P)`, each with so many branches: the
        greedy response, where it was asked for, and samples from 0 on."""
        for ticket, ids, mask in zip(tickets, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            # Padding counts as the first token: it must not be taken for something that was said.
            self._prompt_ids[ticket] = torch.where(mask, ids, ids[0])
        self.draw(tickets, seeds, self.first, num_branches)

    def draw(self, tickets: Sequence[int], seeds: Sequence[int], first: int, num_samples: int) -> None:
        """Let the branches of begun questions be the samples `first` to `first + num_samples`."""
        numbers = uniforms(seeds, num_samples, self.settings.max_new_tokens, first=first).to(self.device)
        self._numbers = _with_room(self._numbers, max(tickets) + 1, num_samples)
        self._numbers[list(tickets), :num_samples] = numbers
        if not self._has_one_temperature:
            self._temperatures = _with_room(self._temperatures, max(tickets) + 1, num_samples)
            self._temperatures[list(tickets), :num_samples] = self._temperatures_of(first, num_samples)
        if self._seen is not None:
            self._see_prompts(tickets)

    def _temperatures_of(self, first: int, num_samples: int) -> Tensor:
        """Those of the samples `first` to `first + num_samples`."""
        sampled = self.settings.temperature
        if first > 0 and self.further_temperature is not None:
            sampled = self.further_temperature
        greedy = min(max(-first, 0), num_samples)
        return torch.tensor([0.0] * greedy + [sampled] * (num_samples - greedy), device=self.device)

    def __call__(self, logits: Tensor, question: Tensor, branch: Tensor, step: Tensor) -> Tensor:
        """Tokens `(N,)` for logits `(N, V)` of these questions and branches at these steps `(N,)`; -1 where logits are
        not finite, of which no token could be sampled."""
        if self.settings.repetition_penalty != 1.0:
            if self._seen is None or self._seen.shape[:2] != self._numbers.shape[:2]:
                self._widen(logits.shape[-1])
            assert self._seen is not None
            logits = penalise_repetition(logits, self._seen[question, branch], self.settings.repetition_penalty)
        finite = logits.amax(dim=-1).isfinite()
        temperatures = None if self._has_one_temperature else self._temperatures[question, branch]
        tokens = choose(logits, self.settings, self._numbers[question, branch, step], temperatures=temperatures)
        if self._seen is not None:
            self._seen[question, branch, tokens] = True
        return torch.where(finite, tokens, -1)

    def _widen(self, vocab_size: int) -> None:
        """Room for what all begun questions and branches have said."""
        old = self._seen
        num_tickets, num_branches, _ = self._numbers.shape
        self._seen = torch.zeros(num_tickets, num_branches, vocab_size, dtype=torch.bool, device=self.device)
        if old is not None:
            self._seen[: old.shape[0], : old.shape[1]] = old
        for ticket, ids in self._prompt_ids.items():
            known = old.shape[1] if old is not None and ticket < old.shape[0] else 0
            self._seen[ticket, known:, ids] = True

    def _see_prompts(self, tickets: Sequence[int]) -> None:
        """The branches of these questions have said nothing but seen their prompts."""
        assert self._seen is not None
        for ticket in tickets:
            if ticket < len(self._seen):
                self._seen[ticket] = False
                self._seen[ticket, :, self._prompt_ids[ticket]] = True
