"""What happens to TRL's forward: fused head, then shared rows, then the shape of the labels.

TRL's `_compute_loss` calls ``model(**batch, labels=labels, fused_lm_head=True)`` and uses nothing of the answer but
statistics of the labels, in their shape. Three layers make that call, the outermost first::

    model(prompt_ids, prefix_*, labels)            TRL calls, with labels (2n, 1 + C)
      add_shared_rows      (this file)             a batch with a `Layout` goes to the right, any other one down
      |                      \\-> forward_segments   rows [prompt | branch | ...], backbone once: (n, S) per token
      |                            in_shape_of_labels    a row per response, chosen ones first: (R, C)
      add_fused_lm_head    (TRL)                   backbone and head in chunks, rows [prompt + response]: (2n, L - 1)
      model.forward        (transformers)

Everything passes through `model.forward`, so DDP, ZeRO, FSDP, gradient checkpointing and PEFT see nothing unusual.

A prompt ``[1, 2]`` with the responses ``[3, 4]`` and ``[5]``, from the collator's batch to what TRL gets:

>>> from align.dpo.collator import shared_batch
>>> prompts = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
>>> batch = shared_batch(prompts, [[[3, 4], [5]]], [(0, 0), (0, 1)], pad_token_id=0)
>>> batch["prompt_ids"].tolist(), batch["prefix_input_ids"].tolist()  # what the model reads: one row, S = 3
([[1, 2]], [[3, 4, 5]])
>>> labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED_LABEL)  # as TRL makes them
>>> labels.tolist()
[[-100, 3, 4], [-100, 5, -100]]
>>> stats = TokenStats(log_probs=torch.tensor([[-0.5, -1.0, -2.0]]))  # log p(3 | 1 2), p(4 | 1 2 3), p(5 | 1 2)
>>> in_shape_of_labels(stats, batch["prefix_token_index"], labels[:, 1:]).log_probs.tolist()  # what TRL sums per row
[[-0.5, -1.0], [-2.0, 0.0]]
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from align.dpo.collator import CORRUPTED_INDEX, CORRUPTED_MASK, LAYOUT_PREFIX, TOKEN_INDEX, layout_of, prompt_inputs_of
from align.dpo.sharding.dummy_batches import add_dummy_rows
from align.prefix.attention import use_shared_prefix
from align.prefix.log_probs import TokenStats, forward_segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED_LABEL = -100


def add_shared_rows(
    model: PreTrainedModel,
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
        output = in_shape_of_labels(stats, kwargs[TOKEN_INDEX], labels[:, 1:])
        if CORRUPTED_INDEX in kwargs:
            output.corrupted_logps = sums_at(stats.log_probs, kwargs[CORRUPTED_INDEX], kwargs[CORRUPTED_MASK])
        return output

    # `generate` and the Trainer read the signature.
    shared_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(shared_forward, model)


@dataclass
class SharedOutput(FusedCausalLMOutput):
    """What TRL reads, and beside it `corrupted_logps` (n,): of chosen responses under corrupted pictures, summed."""

    corrupted_logps: Tensor | None = None


def sums_at(log_probs: Tensor, token_index: Tensor, mask: Tensor) -> Tensor:
    """(n,): the sums of log-probabilities (rows, S) at the places `token_index` (n, C) where `mask` is True."""
    return torch.where(mask, log_probs.flatten()[token_index], 0.0).sum(dim=1)


def in_shape_of_labels(stats: TokenStats, token_index: Tensor, labels: Tensor) -> SharedOutput:
    """Statistics (n, S) of the branches' tokens, put where TRL expects them: (R, C), zero where a label is ignored.

    `token_index` (R, C) int64 says where among the n S tokens those of each response are; a branch that stands in
    several pairs is read for each of them. `labels` (R, C): -100 is padding.
    """
    wanted = labels != IGNORED_LABEL

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if not values.numel():
            return values.new_zeros(wanted.shape)
        return torch.where(wanted, values.flatten()[token_index], values.new_zeros(()))

    log_probs = spread(stats.log_probs)
    assert log_probs is not None
    return SharedOutput(
        loss=-log_probs.sum() / wanted.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=spread(stats.entropy),
        log_sum_sq_probs=spread(stats.log_sum_sq_probs),
        mean_logits=spread(stats.mean_logits),
        is_top1=spread(stats.is_top1),
        label_mask=wanted,
    )


@contextmanager
def log_prob_head(model: PreTrainedModel, *, shared: bool) -> Iterator[None]:
    """Within the context `model` gives log-probabilities as it will in training; afterwards it is as it was."""
    before = model.__dict__.get("forward")
    add_fused_lm_head(model)
    if shared:
        add_shared_rows(model)
    else:
        add_dummy_rows(model)
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
