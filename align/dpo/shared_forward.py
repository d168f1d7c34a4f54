"""A model in; the same model out, whose forward understands batches of the shared layout.

TRL replaces `model.forward` by one that gives per-token statistics of the labels (`add_fused_lm_head`) and uses
nothing but these, in the shape of the labels. This file puts one more layer over it: a batch that carries a `Layout`
is run as rows ``[prompt | response 1 | ... | response K]``, each question once, and answers in TRL's shape. Everything
passes through `model.forward`, so DDP, ZeRO, FSDP, gradient checkpointing and PEFT see nothing unusual.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from align.dpo.collator import LAYOUT_PREFIX, layout_of, prompt_inputs_of
from align.dpo.sharding.dummy_batches import add_blank_rows
from align.prefix.attention import use_shared_prefix
from align.prefix.layout import Layout
from align.prefix.log_probs import TokenStats, forward_segments

IGNORED_LABEL = -100


def add_shared_rows(
    model: Any,
    outputs: Sequence[str] = ("log_probs",),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Let `model` (after TRL's `add_fused_lm_head`) take batches of the shared layout; others go on to TRL's forward.

    `outputs` are the statistics wanted beside the log-probabilities. `autocast` is entered around the shared forward:
    accelerate wraps the forward of the policy itself, but that of a reference model before this patch.

    Raises:
        PrefixUnsupported: there is no attention to be set (`align.prefix.attention.use_shared_prefix`).
    """
    use_shared_prefix(model)
    forward = model.forward

    def shared_forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not any(name.startswith(LAYOUT_PREFIX) for name in kwargs):
            return forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        assert fused_lm_head, "a batch of the shared layout has no logits, only statistics of its labels"
        labels = kwargs.pop("labels")
        kwargs.pop("use_cache", None)
        layout = layout_of(kwargs)
        with autocast():
            stats = forward_segments(self, prompt_inputs_of(kwargs), layout, outputs)
        return in_shape_of_labels(stats, layout, labels[:, 1:])

    # `generate` and the Trainer read the signature.
    shared_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(shared_forward, model)


def in_shape_of_labels(stats: TokenStats, layout: Layout, labels: Tensor) -> FusedCausalLMOutput:
    """Statistics (n, S) of the segments' tokens, put where TRL expects them: (K n, C), zero where a label is ignored.

    `labels` (K n, C) holds the first responses of all rows, then the second ones, and so on; -100 is padding.
    """
    wanted = labels != IGNORED_LABEL
    num_segments = layout.ancestors.shape[1]
    picked = [layout.segment == segment for segment in range(num_segments)]

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        flat = torch.cat([values[mask] for mask in picked])
        return values.new_zeros(wanted.shape).masked_scatter(wanted, flat)

    log_probs = spread(stats.log_probs)
    assert log_probs is not None
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / wanted.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=spread(stats.entropy),
        log_sum_sq_probs=spread(stats.log_sum_sq_probs),
        mean_logits=spread(stats.mean_logits),
        is_top1=spread(stats.is_top1),
        label_mask=wanted,
    )


@contextmanager
def log_prob_head(model: Any, *, shared: bool) -> Iterator[None]:
    """Within the context `model` gives log-probabilities as it will in training; afterwards it is as it was."""
    before = model.__dict__.get("forward")
    add_fused_lm_head(model)
    if shared:
        add_shared_rows(model)
    else:
        add_blank_rows(model)
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
