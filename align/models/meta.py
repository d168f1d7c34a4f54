"""A checkpoint's config.json in, its model without any weights out (torch's meta device):
names and shapes to look at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.errors import UserError
from align.models.families import FAMILIES
from align.models.load import read_config
from align.models.lora import adapter_outside, lora_config
from align.models.modules import freeze_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def meta_model(folder: Path | str, config: dict[str, Any] | None = None) -> Any:
    """The checkpoint's model on the meta device: shapes and names, no storage."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = config or read_config(folder)
    family = FAMILIES.get((config.get("architectures") or [None])[0])
    try:
        with torch.device("meta"):
            if family is not None:
                return family.model._from_config(family.config.from_pretrained(folder))
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return AutoModelForImageTextToText.from_config(settings, trust_remote_code=False)
    except Exception as error:
        # A config.json that is wrong shows in whatever a model's constructor stumbles over.
        raise UserError(
            f"the checkpoint cannot be opened: {type(error).__name__}: {error}",
            where=str(folder),
            fix="check that config.json and the weights belong together",
        ) from error


def with_adapter(model: PreTrainedModel, config: Any) -> Any:
    """The model with peft's adapters in it, all else frozen; `config` is peft's LoraConfig.

    Raises:
        UserError: no layer of the model is meant, or peft does not know where adapters of this family belong.
    """
    from peft import get_peft_model

    # Other ways to begin compute with the weights, which are not there; the shapes are the same.
    plain = replace(config, init_lora_weights=True)
    try:
        with warnings.catch_warnings():
            # peft asks transformers for gradient checkpointing by its old name.
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, plain).get_base_model()
    except Exception as error:  # a pattern that is none, a kind of bias that peft does not know, and the like
        raise UserError(
            f"dpo.lora: {(str(error) or type(error).__name__).splitlines()[0]}",
            fix="set dpo.lora.target_modules, e.g. [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
        ) from None


def model_to_train(policy: Path | str, lora: dict[str, Any] | None, freeze: Sequence[str]) -> Any:
    """The policy on the meta device with its adapter or its frozen parts (`dpo.lora`, `dpo.freeze`), as it is trained.

    Raises:
        UserError: peft refuses the adapter or finds no place for it, or the model has no such part.
    """
    model = meta_model(policy)
    adapter = lora_config(lora)
    if adapter is not None:
        return with_adapter(model, adapter_outside(model, adapter, freeze))
    freeze_parts(model, freeze)
    return model
