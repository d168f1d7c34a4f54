"""All ordered comparisons of a question's K responses: one row behind one prompt, against K(K-1) full prompts.

    python scripts/bench_score.py [--quick] [--json numbers.json]

The peer gives stock transformers the same tokens as K(K-1) full sequences with the image in each, batched as many at a
time as is fastest (tried first), and reads the last position only (`logits_to_keep=1`). Both sides give the same
log-probabilities; that is checked. Target: 5 times as fast at 1000 prompt tokens and 80 per response, K = 5.
"""

from __future__ import annotations

from typing import Any

import torch
from bench_common import (
    Comparison,
    arguments,
    compare_in_turn,
    finish,
    growth,
    print_growth,
    prompt_inputs,
    seconds,
    start,
)

from align.engines.batching import Batch
from align.engines.prompts import PromptTree
from align.engines.shared_path import SharedPath
from align.prefix.attention import stop_shared_prefix
from align.prefix.layout import Segment

TAIL_TOKENS = 12
OPTIONS = [[11], [12]]
TARGET = (1000, 80, 5)


def comparison_tree(response_tokens: int, num_responses: int) -> PromptTree:
    """First responses below the prompt, second responses with the question's rest below each, as an ask is cut."""
    generator = torch.Generator().manual_seed(1)
    responses = torch.randint(20, 4000, (num_responses, response_tokens), generator=generator).tolist()
    tail = torch.randint(20, 4000, (TAIL_TOKENS,), generator=generator).tolist()
    segments, leaf_segments = [], []
    for first in range(num_responses):
        parent = len(segments)
        segments.append(Segment(responses[first]))
        for second in range(num_responses):
            if second != first:
                leaf_segments.append(len(segments))
                segments.append(Segment(responses[second] + tail, parent))
    return PromptTree("", segments, leaf_segments, OPTIONS)


def full_prompts(inputs: dict[str, Any], tree: PromptTree) -> dict[str, Any]:
    """The same comparisons as full sequences of equal length, image in each."""
    paths = [
        [*tree.segments[tree.segments[leaf].parent or 0].token_ids, *tree.segments[leaf].token_ids]
        for leaf in tree.leaf_segments
    ]
    tails = torch.tensor(paths, device=inputs["input_ids"].device)
    ids = torch.cat([inputs["input_ids"].expand(len(paths), -1), tails], dim=1)
    images = {name: value.expand(len(paths), *value.shape[1:]) for name, value in inputs.items() if "_ids" not in name}
    return {**images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compare(
    model: Any, prompt: int, response: int, num_responses: int, *, repeats: int, with_memory: bool
) -> Comparison:
    inputs = prompt_inputs(model, prompt)
    tree = comparison_tree(response, num_responses)
    full = full_prompts(inputs, tree)
    count = len(tree.leaf_segments)

    def ours() -> torch.Tensor:
        return torch.tensor(SharedPath(model, []).log_probs(Batch([0], [tree], inputs, [prompt]))[0])

    @torch.no_grad()
    def theirs(batch_size: int) -> torch.Tensor:
        stop_shared_prefix(model)
        found = []
        for at in range(0, count, batch_size):
            part = {name: value[at : at + batch_size] for name, value in full.items()}
            logits = model(**part, use_cache=False, logits_to_keep=1).logits[:, -1]
            found.append(logits.float().log_softmax(dim=-1)[:, [option[0] for option in OPTIONS]])
        return torch.cat(found)

    error = float((ours() - theirs(1).cpu()).abs().max())
    assert error < (1e-3 if model.dtype == torch.float32 else 0.5), f"the two sides differ by {error}"
    sizes = sorted({size for size in (1, 2, 5, count) if size <= count})
    best = min(sizes, key=lambda size: seconds(lambda: theirs(size)))
    label = {"prompt": prompt, "response": response, "K": num_responses, "comparisons": count, "peer batch": best}
    standing = [*model.parameters(), *inputs.values()] if with_memory else []
    return compare_in_turn(label, ours, lambda: theirs(best), repeats=repeats, standing=standing)


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()  # type: ignore[union-attr]
    model = start(options)
    shapes = [TARGET]
    if not options.quick:
        shapes += [(prompt, 80, 5) for prompt in (200, 400, 2000, 4000)] + [(1000, 80, k) for k in (2, 3, 8)]
        shapes += [(200, 80, 8), (2000, 80, 3)]
    comparisons = [compare(model, *shape, repeats=options.repeats, with_memory=not options.quick) for shape in shapes]
    found = None if options.quick else growth(comparisons, "comparisons")
    if found is not None:
        print_growth(found)
    finish(options, comparisons, comparisons[0], tail_tokens=TAIL_TOKENS, growth=found)


if __name__ == "__main__":
    main()
