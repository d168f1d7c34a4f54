"""Processors of transformers that want a video processor, loaded without it where torchvision is not installed.

transformers 5 ties video processors to torchvision, and with them processors of models that are asked about images only
(LLaVA-OneVision, Qwen2-VL). This can go when it offers them without.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from transformers import ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from align.models.files import read_json

VIDEO_ATTRIBUTE = "video_processor"
CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def needs_torchvision(processor_class: type[ProcessorMixin]) -> bool:
    """Whether a processor class cannot be loaded as it is for want of torchvision."""
    return VIDEO_ATTRIBUTE in processor_class.get_attributes() and importlib.util.find_spec("torchvision") is None


def processor_class(folder: Path, config: dict[str, Any]) -> type[ProcessorMixin] | None:
    """transformers' processor class of a local folder: the one its files name, else that of its model type."""
    named = [read_json(folder / name).get("processor_class") for name in CONFIG_FILES if (folder / name).is_file()]
    for name in (*named, PROCESSOR_MAPPING_NAMES.get(config.get("model_type", ""))):
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, ProcessorMixin):
            return found
    return None


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same class without its video processor. It keeps its name, which is what is written when it is saved."""
    kept = [name for name in processor_class.get_attributes() if name != VIDEO_ATTRIBUTE]
    overrides = {"get_attributes": classmethod(lambda cls: list(kept)), "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), overrides)
