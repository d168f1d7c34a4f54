"""A call of `sample` as the paths see it: questions with their tickets in, what became of their samples out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from align.engines.base import SampleRequest, SamplingSettings
from align.engines.batching import Batch, BatchQueue
from align.engines.sampling import Sampler, SeededSampler
from align.engines.streaming import StreamingSampler

# How many samples more a question wants, given its place, its samples so far and whether each ended by itself.
More = Callable[[int, list[list[int]], list[bool]], int]
OnStep = Callable[[list[list[int]]], None]


class SamplingRun:
    """Which question has which ticket, the sampler of them all, and where results go.

    `on_tokens` gets a question's place, the tokens of its samples, whether each ended by itself and how many tokens the
    prompt has. `more` may ask for further samples behind a prompt that is still encoded, drawn at `further_temperature`
    where it is given. `on_step` hears every token (of a single question).
    """

    def __init__(
        self,
        queue: BatchQueue[SampleRequest],
        settings: SamplingSettings,
        on_tokens: Callable[[int, list[list[int]], list[bool], int], None],
        *,
        device: torch.device,
        eos: Sequence[int],
        more: More | None = None,
        further_temperature: float | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.queue = queue
        self.settings = settings
        self.wants_more = more is not None
        self._on_tokens = on_tokens
        self._more = more
        self._seeded = SeededSampler(settings, device, further_temperature=further_temperature)
        self.sampler: Sampler = self._seeded
        if on_step is not None:
            self.sampler = StreamingSampler(self._seeded, list(eos), on_step)
        self._questions: dict[int, tuple[int, SampleRequest, int]] = {}

    def begin(self, tickets: Sequence[int], batch: Batch[SampleRequest]) -> None:
        """Give a batch's questions their tickets and numbers."""
        self._questions |= dict(
            zip(tickets, zip(batch.places, batch.items, batch.num_prompt_tokens, strict=True), strict=True)
        )
        most = max(map(self.num_branches, batch.items))
        self._seeded.begin(tickets, [request.seed for request in batch.items], most, batch.inputs)
        width = batch.inputs["input_ids"].shape[1]
        self.queue.sizer.saw(self.queue.kind, width, most * self.settings.max_new_tokens)

    def num_branches(self, request: SampleRequest) -> int:
        """How many responses a question begins with."""
        return request.num_samples - self._seeded.first

    def num_more(self, ticket: int, tokens: list[list[int]], stopped: list[bool]) -> int:
        """How many samples more a question wants; they are the next ones of its seed."""
        if self._more is None:
            return 0
        place, request, _ = self._questions[ticket]
        count = self._more(place, tokens, stopped)
        if count:
            self._seeded.draw([ticket], [request.seed], self._seeded.first + len(tokens), count)
        return count

    def finish(self, ticket: int, tokens: list[list[int]], stopped: list[bool]) -> None:
        """A question's samples have all ended."""
        place, _, num_prompt_tokens = self._questions.pop(ticket)
        self.queue.done(place)
        self._on_tokens(place, tokens, stopped, num_prompt_tokens)


SampleQueue = BatchQueue[SampleRequest]
