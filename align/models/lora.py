"""The `dpo.lora` section in, peft's LoraConfig out; checked before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def check_tied_weights(model: PreTrainedModel, adapted: Any) -> None:
    """Refuse an adapter that trains one of two tied weights; both models are those of `align.models.meta`.

    peft would train a copy of the embeddings or of the vocabulary projection, which the checkpoint has no place for:
    its config.json says that the two are one.

    Raises:
        UserError: the vocabulary projection is tied to the embeddings, and the adapter changes either of them.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings is None or head is None or embeddings.weight is not head.weight:
        return
    kinds = {
        "embeddings": (type(embeddings), type(adapted.get_input_embeddings())),
        "vocabulary projection": (type(head), type(adapted.get_output_embeddings())),
    }
    changed = [name for name, (plain, found) in kinds.items() if plain is not found]
    if changed:
        raise UserError(
            f"dpo.lora changes the {' and the '.join(changed)}, which this model ties to each other: the saved "
            "checkpoint could not hold what was trained",
            fix=(
                "take embed_tokens and lm_head out of dpo.lora.target_modules and modules_to_save, or train without"
                " lora"
            ),
        )
