"""Which device and which arithmetic, where the configuration says `auto`."""

from __future__ import annotations

import contextlib
import os

import torch

from align import accelerator
from align.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(setting: str) -> torch.device:
    """The device of this process: its own GPU under a launcher, else the first one, else the CPU.

    Raises:
        UserError: the setting is no device, or one that torch does not see.
    """
    there = accelerator.kind()
    if setting == "auto":
        if there == "cpu":
            return torch.device("cpu")
        # Fewer are visible than there are processes where each sees its own alone (`srun --gpus-per-task=1`).
        return torch.device(there, int(os.environ.get("LOCAL_RANK", "0")) % accelerator.count())
    kind = setting.partition(":")[0]
    device = None
    if kind in accelerator.KINDS:
        # torch knows the name `npu` only where torch_npu is.
        with contextlib.suppress(RuntimeError):
            device = torch.device(setting)
    elif kind not in accelerator.KINDS:
        kinds = ", ".join(accelerator.KINDS)
        raise UserError(
            f"model.device {setting!r} is no device", fix=f"use auto, {kinds}, or one with a number: cuda:1"
        )
    if device is None or device.type not in ("cpu", there):
        raise UserError(
            f"model.device is {setting!r}, but torch sees " + ("no accelerator" if there == "cpu" else f"only {there}"),
            fix="set model.device=auto, or install the torch build for that device (`align env` says what is there)",
        )
    if device.type != "cpu" and device.index is not None and device.index >= accelerator.count():
        raise UserError(
            f"model.device is {setting!r}, but torch sees {accelerator.count()} x {there}",
            fix=f"set model.device=auto, or a number below {accelerator.count()}",
        )
    return device


def pick_dtype(setting: str, device: torch.device) -> torch.dtype:
    """float32 on a CPU, bfloat16 on an accelerator that has it, unless the setting names another."""
    if setting != "auto":
        return DTYPES[setting]
    return torch.bfloat16 if accelerator.has_bfloat16(device) else torch.float32
