"""The `dpo.lora` section in, peft's LoraConfig out; checked before any weight is loaded."""

from __future__ import annotations

from typing import Any

from align.errors import UserError

QUANTIZE_KEY = "quantize"


def peft_fields(lora: dict[str, Any]) -> dict[str, Any]:
    """The fields of peft's LoraConfig among those of `dpo.lora`.

    >>> peft_fields({"r": 16, "quantize": "nf4"})
    {'r': 16}
    """
    return {name: value for name, value in lora.items() if name != QUANTIZE_KEY}


def is_quantised(lora: dict[str, Any] | None) -> bool:
    """Whether the adapter is trained on a policy in four bits (QLoRA)."""
    return bool(lora and lora.get(QUANTIZE_KEY))


def lora_config(fields: dict[str, Any] | None, freeze: list[str]) -> Any:
    """peft's LoraConfig from the configuration, or None where the weights themselves are trained.

    Raises:
        UserError: parts are frozen too, or peft refuses a field.
    """
    if fields is None:
        return None
    from peft import LoraConfig

    if freeze:
        raise UserError("dpo.freeze and dpo.lora exclude each other", fix="choose dpo.lora.target_modules instead")
    try:
        return LoraConfig(**peft_fields(fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"dpo.lora: {error}", fix="see the fields of peft's LoraConfig") from None
