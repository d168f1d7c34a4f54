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
from align.models.lora import QUANTIZE_KEY, is_quantised

KINDS = ("nf4", "fp4")


def quantization(lora: dict[str, Any] | None, device: torch.device, strategy: str) -> Any:
    """transformers' configuration of the four bits, or None where none are asked for.

    Raises:
        UserError: the kind is unknown, there is no GPU or no bitsandbytes, or the strategy shards weights.
    """
    if not is_quantised(lora):
        return None
    assert lora is not None
    kind = lora[QUANTIZE_KEY]
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
            f"dpo.lora.quantize does not go with launch.strategy {strategy}, which shards the weights",
            fix="use ddp: a quantised model is small enough for every GPU",
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )
