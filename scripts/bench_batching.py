"""Responses of mixed lengths: places that ended ones leave are refilled,
against batches that wait for their last response.

    python scripts/bench_batching.py [--quick] [--json numbers.json]

Both sides are the shared path, on the same questions with the same sampled tokens; lengths are drawn once,
exponentially around 48 and at most 256 tokens, and a response ends where its length says. The peer takes the questions
in batches of eight, each of which ends with its last response; ours reads eight at a time, too. Target: 1.5 times the
tokens per second at 200 prompt tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from bench_common import Comparison, arguments, compare_in_turn, finish, prompt_inputs, start
from torch import Tensor

from align.engines.base import SampleRequest, SamplingSettings
from align.engines.batch_size import SAMPLES, BatchSizer
from align.engines.batching import BatchQueue
from align.engines.sampling import Sampler
from align.engines.sampling_run import SampleQueue, SamplingRun
from align.engines.shared_path import SharedPath

QUESTIONS, BATCH, K, MEAN_TOKENS, MOST_TOKENS = 32, 8, 5, 48, 256
TARGET_PROMPT = 200
EOS = 2
SETTINGS = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tokens=MOST_TOKENS)


def drawn_lengths() -> Tensor:
    """`(QUESTIONS, K)`: tokens of every response."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(QUESTIONS, K).exponential_(1 / MEAN_TOKENS, generator=generator)
    return drawn.long().clamp(4, MOST_TOKENS)


class Eight(BatchSizer):
    """As if memory allowed for eight questions at a time."""

    def _by_memory(self, kind: str) -> int:
        return BATCH


class EndingRun(SamplingRun):
    """A sampling run whose responses end where their lengths say."""

    def __init__(self, queue: SampleQueue, lengths: Tensor) -> None:
        super().__init__(queue, SETTINGS, lambda *_: None, device=lengths.device, eos=[EOS])
        self.ends = lengths.new_zeros(len(lengths), K)
        self.lengths = lengths
        self.sampler = self.ending(self.sampler)

    def begin(self, tickets: Any, batch: Any) -> None:
        super().begin(tickets, batch)
        self.ends[list(tickets)] = self.lengths[batch.places]

    def ending(self, sampler: Sampler) -> Sampler:
        def sample(logits: Tensor, question: Tensor, branch: Tensor, step: Tensor) -> Tensor:
            tokens = sampler(logits, question, branch, step)
            return torch.where(step + 1 >= self.ends[question, branch], EOS, tokens.where(tokens != EOS, EOS + 1))

        return sample


def compare(model: Any, prompt: int, *, repeats: int) -> Comparison:
    lengths = drawn_lengths().to(model.device)
    inputs = prompt_inputs(model, prompt, batch_size=QUESTIONS)
    requests = [SampleRequest(str(i), [], (i,), K, seed=i) for i in range(QUESTIONS)]
    sizer = Eight(model)
    sizer.saw(SAMPLES, prompt, K * MOST_TOKENS)

    def encode(batch: list[SampleRequest]) -> dict[str, Tensor]:
        places = [request.seed for request in batch]
        return {name: value[places] for name, value in inputs.items()}

    def queue() -> SampleQueue:
        return BatchQueue(
            requests, encode, lambda given: given, sizer=sizer, kind=SAMPLES, alike=lambda _: True, length=lambda _: 1
        )

    def ours() -> None:
        with queue() as waiting:
            SharedPath(model, [EOS]).sample(waiting, EndingRun(waiting, lengths))

    def theirs() -> None:
        with queue() as waiting:
            run = EndingRun(waiting, lengths)
            while waiting:
                for decoded in SharedPath(model, [EOS]).sample_batch(waiting.take(), run):
                    run.finish(decoded.ticket, decoded.tokens, decoded.stopped)

    label = {"prompt": prompt, "K": K, "questions": QUESTIONS, "batch": sizer.num_items(SAMPLES)}
    found = compare_in_turn(label, ours, theirs, repeats=repeats)
    found.label["tokens"] = int(lengths.sum())
    return found


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()  # type: ignore[union-attr]
    model = start(options)
    shapes = [TARGET_PROMPT] if options.quick else [TARGET_PROMPT, 400, 1000]
    comparisons = [compare(model, prompt, repeats=options.repeats) for prompt in shapes]
    finish(options, comparisons, comparisons[0], mean_tokens=MEAN_TOKENS, most_tokens=MOST_TOKENS)


if __name__ == "__main__":
    main()
