"""The first real batch in; whether the shared path and full sequences agree on it out.

What is compared is what the path really did: samples are compared by the log-probabilities that were found while they
were decoded, branches by those behind a prompt that was encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from align.engines.batching import Batch
from align.engines.decoding import Decoded
from align.engines.prompts import PromptTree
from align.engines.shared_path import SharedPath, renumbered
from align.errors import UserError, is_out_of_memory
from align.prefix.equivalence import Equivalence, check_equivalence, failed
from align.prefix.layout import Layout, Segment
from align.prefix.rows import placeholder_ids

# So many tokens of each sample, so many branches of each prompt.
CHECK_TOKENS = 64
CHECK_BRANCHES = 4


def check_samples(
    model: PreTrainedModel, inputs: dict[str, Any], sample: Callable[[], Sequence[Decoded]]
) -> tuple[Equivalence, Sequence[Decoded]]:
    """Compare the log-probabilities found while decoding with those of the same samples as full sequences.

    Returns the samples too, none where the architecture raised. Running out of memory is raised.
    """
    try:
        decoded = sample()
    except Exception as error:
        if not _is_the_architectures(error):
            raise
        return failed(error), []
    stops = placeholder_ids(model)
    rows, shared = [], []
    for question in decoded:
        row = []
        for tokens, log_probs in zip(question.tokens, question.log_probs, strict=True):
            # A sampled image placeholder would be taken for an image when fed in together with one.
            length = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
            length = min(length, CHECK_TOKENS)
            row.append(Segment(tokens[:length]))
            shared += log_probs[:length]
        rows.append(row)
    return _compared(model, inputs, rows, shared), decoded


def check_branches(model: PreTrainedModel, eos: Sequence[int], batch: Batch[PromptTree]) -> Equivalence:
    """Compare branches behind encoded prompts with full sequences, on a few of each prompt."""
    trees = [_first_branches(tree) for tree in batch.items]
    part = Batch(batch.places, trees, batch.inputs, batch.num_prompt_tokens)
    try:
        found = SharedPath(model, eos).loglikelihood(part)
    except Exception as error:
        if not _is_the_architectures(error):
            raise
        return failed(error)
    shared = [value for row in found for segment in row for value in segment]
    return _compared(model, batch.inputs, [tree.segments for tree in trees], shared)


def _is_the_architectures(error: Exception) -> bool:
    """Whether an exception says something about the model's architecture."""
    return not isinstance(error, UserError) and not is_out_of_memory(error)


def _compared(
    model: PreTrainedModel, inputs: dict[str, Any], rows: Sequence[Sequence[Segment]], log_probs: Sequence[float]
) -> Equivalence:
    """`log_probs` are those of all tokens of the rows' segments, one after the other."""
    layout = Layout.build(inputs["attention_mask"], rows, pad_token_id=0)
    is_token = layout.is_token.cpu()
    shared = torch.zeros(is_token.shape).masked_scatter(is_token, torch.tensor(log_probs))
    return check_equivalence(model, inputs, layout, shared)


def _first_branches(tree: PromptTree) -> PromptTree:
    wanted: set[int] = set()
    for leaf in tree.leaf_segments[:CHECK_BRANCHES]:
        node: int | None = leaf
        while node is not None:
            wanted.add(node)
            node = tree.segments[node].parent
    return PromptTree(tree.prompt, renumbered(tree.segments, sorted(wanted)), [], [])
