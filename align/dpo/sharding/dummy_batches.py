"""A model in; the same model out, whose forward takes one more row with a blank image and gives nothing for it.

Where a batch of the plain layout has no image, the collator lays a blank one beside it (`PairCollator.always_images`),
so that every process of a launch runs the vision tower in every step. TRL must not see the row: it halves what it gets
into chosen and rejected.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from typing import Any

import torch
from torch import Tensor

BLANK_PREFIX = "blank_"
IGNORED_LABEL = -100


def set_blank_row_apart(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose last row is the blank one, with that row's tokens and mask under names of their own.

    >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "attention_mask": torch.ones(3, 2)}
    >>> apart = set_blank_row_apart(batch | {"completion_mask": torch.zeros(3, 2)})
    >>> apart["input_ids"].tolist(), apart["blank_input_ids"].tolist(), len(apart["completion_mask"])
    ([[1, 2], [3, 4]], [[5, 6]], 2)
    """
    apart = dict(batch)
    for name in ("input_ids", "attention_mask"):
        apart[name], apart[BLANK_PREFIX + name] = batch[name][:-1], batch[name][-1:]
    apart["completion_mask"] = batch["completion_mask"][:-1]
    return apart


def add_blank_rows(model: Any) -> None:
    """Let `model` (after TRL's `add_fused_lm_head`) take batches of `set_blank_row_apart`; others pass unchanged."""
    forward = model.forward

    def forward_with_blank_row(self: Any, *args: Any, **kwargs: Any) -> Any:
        blank = {name: kwargs.pop(BLANK_PREFIX + name, None) for name in ("input_ids", "attention_mask")}
        if blank["input_ids"] is None:
            return forward(*args, **kwargs)
        ignored = torch.full_like(blank["input_ids"], IGNORED_LABEL)
        for name, row in {**blank, "labels": ignored}.items():
            kwargs[name] = torch.cat((kwargs[name], row))
        output = forward(*args, **kwargs)
        for field in dataclasses.fields(output):
            value = getattr(output, field.name)
            if isinstance(value, Tensor) and value.ndim:
                setattr(output, field.name, value[:-1])
        return output

    # `generate` and the Trainer read the signature.
    forward_with_blank_row.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward_with_blank_row, model)
