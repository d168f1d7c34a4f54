"""Processors of transformers that want torchvision for what is not asked of them here, loaded without it.

transformers 5 ties video processors to torchvision, and with them processors of models that are asked about images only
(LLaVA-OneVision, Qwen-VL, InternVL, SmolVLM). This can go when it offers them without.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from align.models.files import read_json
from align.models.pixtral_pil import PixtralProcessor

ON_PIL: dict[str, type[ProcessorMixin]] = {"PixtralProcessor": PixtralProcessor}
VIDEO_ATTRIBUTE = "video_processor"
CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def needs_torchvision(processor_class: type[ProcessorMixin]) -> bool:
    """Whether a processor class cannot be loaded as it is without torchvision."""
    return VIDEO_ATTRIBUTE in processor_class.get_attributes() and importlib.util.find_spec("torchvision") is None


def processor_class(folder: Path, config: dict[str, Any]) -> type[ProcessorMixin] | None:
    """transformers' processor class of a local folder: the one its files name, else that of its model type.

    Where transformers withholds it without torchvision, it is our own in its place.
    """
    named = [read_json(folder / name).get("processor_class") for name in CONFIG_FILES if (folder / name).is_file()]
    for name in (*named, PROCESSOR_MAPPING_NAMES.get(config.get("model_type", ""))):
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if "torchvision" in getattr(found, "_backends", ()):
            found = ON_PIL.get(str(name))
        if isinstance(found, type) and issubclass(found, ProcessorMixin):
            return found
    return None


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same class without its video processor. It keeps its name, which is what is written when it is saved."""
    every = processor_class.get_attributes()
    kept = [name for name in every if name != VIDEO_ATTRIBUTE]
    overrides: dict[str, Any] = {
        "get_attributes": classmethod(lambda cls: list(kept)),
        "__module__": processor_class.__module__,
    }
    parameter = inspect.signature(processor_class.__init__).parameters.get(VIDEO_ATTRIBUTE)
    if parameter is not None and parameter.default is inspect.Parameter.empty:
        overrides |= _for_smolvlm(processor_class, every.index(VIDEO_ATTRIBUTE))
    return type(processor_class.__name__, (processor_class,), overrides)


def _for_smolvlm(processor_class: type[ProcessorMixin], position: int) -> dict[str, Any]:
    """What SmolVLM's processor needs besides: its constructor insists on a video processor and on a package that writes
    numbers in prompts of videos as words, it reads the video processor's settings to render any conversation, and
    transformers 5.17 withholds its image processor, though the form on PIL needs no torchvision."""
    module = sys.modules[processor_class.__module__]
    if getattr(module, "num2words", "") is None:
        module.num2words = str  # type: ignore[attr-defined]
    smolvlm = importlib.import_module("transformers.models.smolvlm")
    if getattr(smolvlm.SmolVLMImageProcessorPil, "is_dummy", False):
        pil = importlib.import_module("transformers.models.smolvlm.image_processing_pil_smolvlm")
        smolvlm.SmolVLMImageProcessorPil = pil.SmolVLMImageProcessorPil  # type: ignore[attr-defined]

    def arguments(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        found = super(cls, cls)._get_arguments_from_pretrained(*args, **kwargs)
        return [*found[:position], None, *found[position:]]

    return {
        "_get_arguments_from_pretrained": classmethod(arguments),
        "apply_chat_template": ProcessorMixin.apply_chat_template,
    }
