"""A configuration in; what of its training cannot work out, before any weight is loaded."""

from __future__ import annotations

from typing import Any

from align.config import Config
from align.dpo.trainer import check_projector
from align.models.load import check_checkpoint
from align.models.lora import lora_config
from align.models.meta import meta_model, with_adapter
from align.models.modules import freeze_parts


def model_to_train(config: Config, policy: str) -> Any:
    """The model without weights, with its adapter or its frozen parts, as training has it."""
    model = meta_model(policy)
    adapter = lora_config(config.dpo.lora, config.dpo.freeze)
    if adapter is not None:
        return with_adapter(model, adapter)
    freeze_parts(model, config.dpo.freeze)
    return model


def check_trained(config: Config, policy: str) -> None:
    """Look at what would be trained, without weights.

    Raises:
        UserError: the checkpoint is not whole, an adapter finds no layers, nothing is left to train, or the projector
            has a rate and is not trained.
    """
    check_checkpoint(policy, allow_pickle=config.model.allow_pickle)
    model = model_to_train(config, policy)
    if config.dpo.projector_learning_rate_multiplier != 1.0:
        check_projector(model)
