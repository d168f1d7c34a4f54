"""A checkpoint folder in, its model and processor out, decided by `architectures` in its config.json.

`model_type` is no guide: several families share "valley" and "llava". What is not ours goes to transformers' Auto classes.
No code from a checkpoint is ever run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from align.models.valley_eagle import ValleyEagleConfig, ValleyProcessor, ValleyQwen2ForCausalLM


@dataclass(frozen=True)
class Family:
    """The three classes of a family of checkpoints."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: type[ProcessorMixin]


FAMILIES: dict[str, Family] = {
    "ValleyQwen2ForCausalLM": Family(ValleyEagleConfig, ValleyQwen2ForCausalLM, ValleyProcessor),
}


class ValleyConfig(PreTrainedConfig):
    """Stands for `model_type: "valley"` in `AutoConfig` and becomes the config class of the folder's architecture."""

    model_type = "valley"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        architecture = (config_dict.get("architectures") or [None])[0]
        if architecture not in FAMILIES:
            raise ValueError(
                f"config.json: expected architectures to name one of {', '.join(FAMILIES)}, found {architecture!r}"
            )
        return FAMILIES[architecture].config.from_dict(config_dict, **kwargs)


def register() -> None:
    """Makes the Auto classes know our families; safe to call again."""
    AutoConfig.register("valley", ValleyConfig, exist_ok=True)
    for family in FAMILIES.values():
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
            auto_class.register(family.config, family.model, exist_ok=True)
        AutoProcessor.register(family.config, family.processor, exist_ok=True)


register()


def read_config(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def load_processor(folder: str | Path, **settings: Any) -> Any:
    return AutoProcessor.from_pretrained(folder, **settings)


def load_model(folder: str | Path, *, dtype: str | torch.dtype = "auto", **kwargs: Any) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **kwargs)
