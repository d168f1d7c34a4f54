"""`dpo.optim` in, the bytes that its states take of a trained weight out, and whether it can move weights of bfloat16.

The optimisers are transformers', by its names. Those of 8 and 4 bits keep a scale for every block of numbers
(https://arxiv.org/abs/2110.02861, section 2.1). A weight of bfloat16 has 8 bits of mantissa: a step smaller than half
of its last bit is lost, always, unless it is rounded at random in proportion to what is lost (stochastic rounding,
https://arxiv.org/abs/2010.06192).
"""

from __future__ import annotations

from typing import Any

import torch

from align.errors import UserError

# torchao's, the only ones of transformers that round at random; TRL's name for the setting.
ROUNDING = ("adamw_torch_8bit", "adamw_torch_4bit")
ROUNDING_ARGUMENT = "bf16_stochastic_round"
# A number of 8 bits with an fp32 scale for each block of 256, and of 4 bits with one for each of 128.
EIGHT_BITS, FOUR_BITS = 1 + 4 / 256, 0.5 + 4 / 128
# How many numbers are kept of a weight, and their bytes; None: those of the weight.
STATES: dict[str, tuple[int, float | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_torch_8bit": (2, EIGHT_BITS),
    "adamw_torch_4bit": (2, FOUR_BITS),
    "adamw_8bit": (2, EIGHT_BITS),
    "adamw_bnb_8bit": (2, EIGHT_BITS),
    "lion_8bit": (1, EIGHT_BITS),
    "lion_32bit": (1, 4),
    "rmsprop": (1, None),
    "rmsprop_bnb": (1, 4),
    "rmsprop_bnb_32bit": (1, 4),
    "rmsprop_bnb_8bit": (1, EIGHT_BITS),
    "adagrad": (1, None),
    # A row and a column of each matrix.
    "adafactor": (0, None),
    "sgd": (0, None),
}


def state_bytes(optimizer: str, weight_bytes: float) -> float:
    """Bytes on the GPU of the states of one weight; one that is not known counts as AdamW.

    Paged states count nothing: they leave for the host's memory where the GPU is full.

    >>> state_bytes("adamw_torch", 4), state_bytes("adamw_torch_8bit", 2), state_bytes("paged_adamw_8bit", 2)
    (8, 2.03125, 0)
    """
    if optimizer.startswith("paged_"):
        return 0
    count, size = STATES.get(optimizer, STATES["adamw_torch"])
    return count * (weight_bytes if size is None else size)


def is_known(optimizer: str) -> bool:
    """Whether the memory of its states is known here."""
    return optimizer in STATES or optimizer.startswith("paged_")


def rounds_at_random(fields: dict[str, Any]) -> bool:
    """Whether the training arguments ask for stochastic rounding of bfloat16 weights."""
    arguments = dict(part.strip().partition("=")[::2] for part in str(fields.get("optim_args") or "").split(","))
    return arguments.get(ROUNDING_ARGUMENT, "").lower() in ("true", "1", "yes")


def check_rounding(fields: dict[str, Any], dtype: torch.dtype, *, adapter: bool, strategy: str = "ddp") -> str | None:
    """What is lost in weights of `dtype`, in words; None where every step arrives.

    An adapter is float32, and DeepSpeed keeps a float32 copy of what it trains.

    Raises:
        UserError: stochastic rounding is asked for where it has no effect.
    """
    optimizer = str(fields.get("optim", "adamw_torch"))
    copied = adapter or strategy.startswith("zero")
    if not rounds_at_random(fields):
        if dtype != torch.bfloat16 or copied:
            return None
        return (
            "weights are trained in bfloat16: steps below 1/256 of a weight are lost, at usual rates nearly all; "
            f"set dpo.optim: {ROUNDING[0]} and dpo.optim_args: {ROUNDING_ARGUMENT}=True, or model.dtype: float32"
        )
    if optimizer not in ROUNDING:
        raise UserError(
            f"dpo.optim_args asks for {ROUNDING_ARGUMENT}, which {optimizer} does not read",
            fix=f"set dpo.optim: {ROUNDING[0]}, or leave it out",
        )
    if dtype != torch.bfloat16 or copied:
        raise UserError(
            f"dpo.optim_args asks for {ROUNDING_ARGUMENT}, which has no effect: what is trained is not bfloat16 but "
            + ("an adapter in float32" if adapter else f"a float32 copy ({strategy})" if copied else _name(dtype)),
            fix="leave it out" if copied else "set model.dtype: bfloat16, or leave it out",
        )
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
