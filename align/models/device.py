"""Which device and which arithmetic, where the configuration says `auto`."""

from __future__ import annotations

import os

import torch

from align.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(setting: str) -> torch.device:
    """The device of this process: its own GPU under a launcher, else the first one, else the CPU."""
    if setting == "auto":
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise UserError(f"model.device {setting!r} is no device", fix="use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device is {setting!r}, but no GPU is visible", fix="set model.device=auto")
    return device


def pick_dtype(setting: str, device: torch.device) -> torch.dtype:
    """float32 on a CPU, bfloat16 on a GPU that has it, unless the setting names another."""
    if setting != "auto":
        return DTYPES[setting]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
