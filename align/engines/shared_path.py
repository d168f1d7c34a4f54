"""The shared path: what is asked of a batch of questions, computed behind prompts that are encoded once.

The counterpart of `align.engines.unshared_path`. Inputs are right-padded and on the model's device, the model has been given to
`use_shared_prefix`. Raises PrefixUnsupported where the architecture does not allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from align.engines.decoding import Branches, DecodeOutput, Sampler, decode, prefill
from align.engines.prompts import PromptTree, of_segments
from align.prefix.attention import AttentionPlan, active_layout
from align.prefix.equivalence import Equivalence, check_equivalence
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import forward_segments, head_of, row_hidden_states
from align.prefix.rows import backbone_of, placeholder_ids, prompt_positions_of
from align.prefix.token_stats import token_stats

# What the first batch is checked on: so many tokens of each sample, so many branches of each prompt.
CHECK_TOKENS = 64
CHECK_BRANCHES = 4


def sample_behind(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    choose: Sampler,
    *,
    num_samples: int,
    max_new_tokens: int,
    eos: list[int],
    on_row: Callable[[int, list[list[int]], list[bool]], None] | None = None,
    with_log_probs: bool = False,
) -> DecodeOutput:
    """Grow `num_samples` branches behind every prompt; see `grow` for the rest."""
    mask = inputs["attention_mask"].bool()
    positions, start = prompt_positions_of(model, inputs, mask)
    cache, hidden = prefill(model, inputs, positions)
    last = mask.sum(dim=1) - 1
    rows = torch.arange(len(mask), device=mask.device)
    shape = (len(mask), num_samples)
    branches = Branches(
        cache=cache,
        visible=mask[:, None].expand(-1, num_samples, -1),
        position=start[:, None].expand(shape),
        hidden=hidden[rows, last][:, None].expand(-1, num_samples, -1),
        alive=torch.ones(shape, dtype=torch.bool, device=mask.device),
    )
    return decode(
        model,
        branches,
        choose,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos,
        num_position_axes=len(positions) if positions.ndim == 3 else None,
        with_log_probs=with_log_probs,
        on_row=on_row,
    )


@torch.no_grad()
def shared_log_probs(model: PreTrainedModel, inputs: dict[str, Any], trees: Sequence[PromptTree]) -> list[np.ndarray]:
    """Per prompt `(num_branches, num_options)`: all branches with all options in one row behind the prompt."""
    rows = [[*tree.segments, *_option_segments(tree)] for tree in trees]
    layout = Layout.build(inputs["attention_mask"], rows, pad_token_id=0)
    reads = [_reads(tree, last) for tree, last in zip(trees, layout.last.tolist(), strict=True)]
    at = torch.tensor([(b, *read) for b, row in enumerate(reads) for read in row], device=layout.last.device)
    hidden = row_hidden_states(model, inputs, layout)
    head = head_of(model)
    values = token_stats(
        hidden[at[:, 0], at[:, 1]].to(head.weight.device),
        head.weight,
        head.bias,
        at[:, 2].to(head.weight.device),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    ).log_probs.tolist()
    found = iter(values)
    return [
        np.array([[sum(next(found) for _ in option) for option in tree.options] for _ in tree.leaf_segments])
        for tree in trees
    ]


def _option_segments(tree: PromptTree) -> list[Segment]:
    """A segment below every leaf for every option of several tokens; its last token is predicted, not read."""
    return [Segment(option[:-1], leaf) for leaf in tree.leaf_segments for option in tree.options if len(option) > 1]


def _reads(tree: PromptTree, last: list[int]) -> list[tuple[int, int]]:
    """For every token of every option of every branch: where in the row it is predicted, and its id.

    `last` is the row's part of `Layout.last`.
    """
    reads = []
    segment = len(tree.segments)
    for leaf in tree.leaf_segments:
        for option in tree.options:
            reads.append((last[leaf], option[0]))
            if len(option) > 1:
                first = last[segment] - (len(option) - 2)
                reads += [(first + i, token) for i, token in enumerate(option[1:])]
                segment += 1
    return reads


@torch.no_grad()
def shared_loglikelihood(
    model: PreTrainedModel, inputs: dict[str, Any], trees: Sequence[PromptTree], *, temperature: float
) -> list[list[list[float]]]:
    """Per tree and segment the log-probabilities of its tokens."""
    layout = Layout.build(inputs["attention_mask"], [tree.segments for tree in trees], pad_token_id=0)
    return of_segments(forward_segments(model, inputs, layout, temperature=temperature).log_probs, trees)


@torch.no_grad()
def shared_generate(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    trees: Sequence[PromptTree],
    *,
    max_new_tokens: int,
    eos: list[int],
) -> list[list[list[int]]]:
    """Greedy answers of all branches, growing side by side behind the prompt."""
    layout = Layout.build(inputs["attention_mask"], [tree.segments for tree in trees], pad_token_id=0)
    positions, start = prompt_positions_of(model, inputs, layout.prompt_mask)
    axes = len(positions) if positions.ndim == 3 else None
    cache, _ = prefill(model, inputs, positions)
    segment_positions = start[:, None] + layout.path_position
    mask = layout.mask()
    with active_layout(AttentionPlan(0, mask)):
        hidden = backbone_of(model)(
            input_ids=layout.input_ids,
            position_ids=segment_positions if axes is None else segment_positions.expand(axes, -1, -1),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
    slots = max(len(tree.leaf_segments) for tree in trees)
    leaf_segments = torch.tensor(
        [tree.leaf_segments + tree.leaf_segments[:1] * (slots - len(tree.leaf_segments)) for tree in trees]
    )
    alive = torch.tensor([[k < len(tree.leaf_segments) for k in range(slots)] for tree in trees])
    leaf_segments, alive = leaf_segments.to(hidden.device), alive.to(hidden.device)
    ends = layout.last.gather(1, leaf_segments) - layout.prompt_mask.shape[1]
    assert bool((ends >= 0).all()), "a leaf has at least the template's rest"
    rows = torch.arange(len(trees), device=hidden.device)[:, None]
    branches = Branches(
        cache=cache,
        visible=mask[:, 0][rows, ends],
        position=segment_positions.gather(1, ends) + 1,
        hidden=hidden[rows, ends],
        alive=alive,
    )
    return decode(
        model,
        branches,
        lambda logits, *_: logits.argmax(dim=-1),
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos,
        num_position_axes=axes,
    ).tokens


def check_decoding(model: PreTrainedModel, inputs: dict[str, Any], decoded: DecodeOutput) -> Equivalence:
    """Compare the log-probabilities found while growing with those of the same samples as full sequences."""
    stop_tokens = placeholder_ids(model)
    rows, shared = [], []
    for tokens, log_probs in zip(decoded.tokens, decoded.log_probs, strict=True):
        row = []
        for generated_ids, values in zip(tokens, log_probs, strict=True):
            # A sampled image placeholder would be taken for an image when fed in together with one.
            length = next((i for i, token in enumerate(generated_ids) if token in stop_tokens), len(generated_ids))
            length = min(length, CHECK_TOKENS)
            row.append(Segment(generated_ids[:length]))
            shared += values[:length]
        rows.append(row)
    layout = Layout.build(inputs["attention_mask"], rows, pad_token_id=0)
    is_token = layout.is_token.cpu()
    found = torch.zeros(is_token.shape).masked_scatter(is_token, torch.tensor(shared))
    return check_equivalence(model, inputs, layout, found)


def check_branches(model: PreTrainedModel, inputs: dict[str, Any], trees: Sequence[PromptTree]) -> Equivalence:
    """Compare whole rows with separate sequences on a few branches of each prompt."""
    rows = []
    for tree in trees:
        wanted: set[int] = set()
        for leaf in tree.leaf_segments[:CHECK_BRANCHES]:
            node: int | None = leaf
            while node is not None:
                wanted.add(node)
                node = tree.segments[node].parent
        new = {old: index for index, old in enumerate(sorted(wanted))}
        parents = {old: tree.segments[old].parent for old in new}
        rows.append(
            [Segment(tree.segments[old].token_ids, None if p is None else new[p]) for old, p in parents.items()]
        )
    return check_equivalence(model, inputs, Layout.build(inputs["attention_mask"], rows, pad_token_id=0))
