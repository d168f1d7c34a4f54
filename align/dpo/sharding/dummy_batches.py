"""A model in; the same model out, whose forward takes one more row, a dummy with a blank image,
and gives nothing for it.

Where a batch of the plain layout has no image, the collator adds such a row (`PairCollator.always_images`),
so that every process of a launch runs the vision tower in every step. TRL must not see the row: it halves what it gets
into chosen and rejected.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DUMMY_PREFIX = "dummy_"
IGNORED_LABEL = -100


def split_dummy_row(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose last row is the dummy, with that row's tokens and mask under names of their own.

    >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "attention_mask": torch.ones(3, 2)}
    >>> apart = split_dummy_row(batch | {"completion_mask": torch.zeros(3, 2)})
    >>> apart["input_ids"].tolist(), apart["dummy_input_ids"].tolist(), len(apart["completion_mask"])
    ([[1, 2], [3, 4]], [[5, 6]], 2)
    """
    apart = dict(batch)
    for name in ("input_ids", "attention_mask"):
        apart[name], apart[DUMMY_PREFIX + name] = batch[name][:-1], batch[name][-1:]
    apart["completion_mask"] = batch["completion_mask"][:-1]
    return apart


def add_dummy_rows(model: PreTrainedModel) -> None:
    """Let `model` (after TRL's `add_fused_lm_head`) take batches of `split_dummy_row`; others pass unchanged."""
    forward = model.forward

    def forward_with_dummy_row(self: Any, *args: Any, **kwargs: Any) -> Any:
        dummy = {name: kwargs.pop(DUMMY_PREFIX + name, None) for name in ("input_ids", "attention_mask")}
        if dummy["input_ids"] is None:
            return forward(*args, **kwargs)
        ignored = torch.full_like(dummy["input_ids"], IGNORED_LABEL)
        for name, row in {**dummy, "labels": ignored}.items():
            kwargs[name] = torch.cat((kwargs[name], row))
        output = forward(*args, **kwargs)
        for field in dataclasses.fields(output):
            value = getattr(output, field.name)
            if isinstance(value, Tensor) and value.ndim:
                setattr(output, field.name, value[:-1])
        return output

    # `generate` and the Trainer read the signature.
    forward_with_dummy_row.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward_with_dummy_row, model)
