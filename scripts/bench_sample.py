"""Sampling K responses to a question: one prefill and one row of branches, against stock `model.generate`.

    python scripts/bench_sample.py [--quick] [--json numbers.json]

The peer is transformers' `model.generate(num_return_sequences=K)` on the same batch of questions, with the same
temperature, top-p and number of new tokens; nothing ends early on either side. Target: 2.5 times the questions per
second at 1000 prompt tokens, K = 5 and 64 new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from bench_common import Comparison, arguments, compare_in_turn, finish, growth, print_growth, prompt_inputs, start

from align.engines.base import SamplingSettings
from align.engines.decoding import Branches, Decoder, prefill
from align.engines.sampling import SeededSampler
from align.prefix.attention import stop_shared_prefix, use_shared_prefix

NEW_TOKENS = 64
TARGET = {"prompt": 1000, "K": 5}
SETTINGS = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tokens=NEW_TOKENS)


def compare(
    model: Any, prompt: int, num_samples: int, *, batch_size: int, repeats: int, with_memory: bool
) -> Comparison:
    inputs = prompt_inputs(model, prompt, batch_size=batch_size)

    def ours() -> Any:
        use_shared_prefix(model)
        sampler = SeededSampler(SETTINGS, inputs["input_ids"].device)
        sampler.begin(range(batch_size), range(batch_size), num_samples, inputs)
        decoder = Decoder(model, sampler, max_new_tokens=NEW_TOKENS, eos=[])
        decoder.add(
            Branches.behind(prefill(model, inputs, decoder.cache, range(batch_size)), [num_samples] * batch_size)
        )
        while decoder.num_branches:
            decoder.step()

    @torch.no_grad()
    def theirs() -> Any:
        stop_shared_prefix(model)
        return model.generate(
            **inputs,
            do_sample=True,
            temperature=SETTINGS.temperature,
            top_p=SETTINGS.top_p,
            top_k=0,
            num_return_sequences=num_samples,
            max_new_tokens=NEW_TOKENS,
        )

    label = {"prompt": prompt, "K": num_samples, "questions": batch_size}
    standing = [*model.parameters(), *inputs.values()] if with_memory else []
    return compare_in_turn(label, ours, theirs, repeats=repeats, standing=standing)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch-size", type=int, default=4, help="questions at a time, on both sides")
    options = parser.parse_args()
    model = start(options)
    shapes = [(TARGET["prompt"], TARGET["K"])]
    if not options.quick:
        shapes += (
            [(prompt, 5) for prompt in (200, 400, 2000, 4000)]
            + [(1000, k) for k in (1, 2, 10, 20)]
            + [(200, 20), (2000, 2)]
        )
    comparisons = [
        compare(
            model,
            prompt,
            k,
            batch_size=options.batch_size,
            repeats=options.repeats,
            with_memory=not options.quick,
        )
        for prompt, k in shapes
    ]
    found = None if options.quick else growth(comparisons, "K")
    if found is not None:
        print_growth(found)
    finish(options, comparisons, comparisons[0], new_tokens=NEW_TOKENS, growth=found)


if __name__ == "__main__":
    main()
