"""QLoRA (arXiv 2305.14314): the policy in four bits while an adapter on it is trained, for one small GPU.

`dpo.lora: {r: 16, quantize: nf4}`. The four bits hold the language model's and the towers' linear layers, the
vocabulary projection stays as it is. The reference is the same quantised model without its adapter. At the end of the
round the adapter is merged into the policy's own weights, not into the rounded ones (`align.dpo.sharding.gather`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from align.errors import UserError

KEY = "quantize"
KINDS = ("nf4", "fp4")


def is_quantised(lora: dict[str, Any] | None) -> bool:
    return bool(lora and lora.get(KEY))


def peft_fields(lora: dict[str, Any]) -> dict[str, Any]:
    """The fields of peft's LoraConfig among those of `dpo.lora`.

    >>> peft_fields({"r": 16, "quantize": "nf4"})
    {'r': 16}
    """
    return {name: value for name, value in lora.items() if name != KEY}


def quantization(lora: dict[str, Any] | None, device: torch.device, strategy: str) -> Any:
    """transformers' configuration of the four bits, or None where none are asked for.

    Raises:
        UserError: the kind is unknown, there is no GPU or no bitsandbytes, or the strategy spreads weights.
    """
    if not is_quantised(lora):
        return None
    assert lora is not None
    kind = lora[KEY]
    if kind not in KINDS:
        raise UserError(f"dpo.lora.quantize is {kind!r}", fix=f"use one of {', '.join(KINDS)}, or leave it out")
    if device.type != "cuda":
        raise UserError(
            "dpo.lora.quantize needs a CUDA GPU, and there is none", fix="train the adapter without it (dpo.lora)"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("dpo.lora.quantize needs bitsandbytes, which is not installed", fix="pip install bitsandbytes")
    if strategy != "ddp":
        raise UserError(
            f"dpo.lora.quantize does not go with launch.strategy {strategy}, which spreads the weights",
            fix="use ddp: a quantised model is small enough for every GPU",
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )
