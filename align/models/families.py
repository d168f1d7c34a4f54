"""Our own families of checkpoints, by `architectures` in config.json, and their registration with transformers.

`model_type` is no guide: "valley" and "llava" are each shared by several families that have nothing but the name in
common. A new family is a folder beside `valley_eagle` and one line in `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

from align.models.llava_lmms import LlavaQwenConfig, LlavaQwenForCausalLM, LlavaQwenProcessor
from align.models.valley1 import (
    ChineseValleyConfig,
    LlavaLlamaForCausalLM,
    ValleyLlamaConfig,
    ValleyLlamaForCausalLM,
    ValleyLlamaProcessor,
)
from align.models.valley25 import Valley25Config, Valley25Processor, ValleyQwen3ForCausalLM
from align.models.valley_eagle import ValleyEagleConfig, ValleyProcessor, ValleyQwen2ForCausalLM
from align.models.vl360 import QH360_VL_LlamaForCausalLM, QH360VLConfig, QH360VLProcessor


@dataclass(frozen=True)
class Family:
    """The three classes of a family and how its tensor names on disk differ from those in memory.

    `names_on_disk`: regular expressions and their replacements, applied in order; they leave names on disk as they are.
    `stored_buffers`: regular expressions of names on disk that are no weights: buffers that transformers 4 stored. They
    are not loaded, and carried from a checkpoint to those made from it.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    processor: type[ProcessorMixin]
    names_on_disk: tuple[tuple[str, str], ...] = ()
    stored_buffers: tuple[str, ...] = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")


# transformers 5 has no inner `vision_model` in SigLIP; the checkpoints do.
SIGLIP_ON_DISK = (
    (r"^model\.vision_tower\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_tower.vision_model."),
)
CLIP_ON_DISK = ((r"^model\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_model."),)

FAMILIES: dict[str, Family] = {
    "ValleyQwen2ForCausalLM": Family(ValleyEagleConfig, ValleyQwen2ForCausalLM, ValleyProcessor, SIGLIP_ON_DISK),
    "LlavaQwenForCausalLM": Family(LlavaQwenConfig, LlavaQwenForCausalLM, LlavaQwenProcessor, SIGLIP_ON_DISK),
    "ValleyQwen3ForCausalLM": Family(Valley25Config, ValleyQwen3ForCausalLM, Valley25Processor),
    # A subclass of the next, so in front of it.
    "LlavaLlamaForCausalLM": Family(ChineseValleyConfig, LlavaLlamaForCausalLM, ValleyLlamaProcessor, CLIP_ON_DISK),
    "ValleyLlamaForCausalLM": Family(ValleyLlamaConfig, ValleyLlamaForCausalLM, ValleyLlamaProcessor, CLIP_ON_DISK),
    "QH360_VL_LlamaForCausalLM": Family(QH360VLConfig, QH360_VL_LlamaForCausalLM, QH360VLProcessor, SIGLIP_ON_DISK),
}


class ValleyConfig(PreTrainedConfig):
    """Stands for `model_type: "valley"` in `AutoConfig` and gives the config class of the folder's architecture."""

    model_type = "valley"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of the base class, from keys of any version of the layout."""
        architecture = (config_dict.get("architectures") or [None])[0]
        family = FAMILIES.get(architecture)
        if family is None or family.config.model_type != cls.model_type:
            known = ", ".join(name for name, known in FAMILIES.items() if known.config.model_type == cls.model_type)
            raise ValueError(f"config.json: expected architectures to name one of {known}, found {architecture!r}")
        return family.config.from_dict(config_dict, **kwargs)


def register() -> None:
    """Makes the Auto classes know our families; may be called again."""
    AutoConfig.register("valley", ValleyConfig, exist_ok=True)
    for family in FAMILIES.values():
        if family.config.model_type != ValleyConfig.model_type:
            AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
            auto_class.register(family.config, family.model, exist_ok=True)
        AutoProcessor.register(family.config, family.processor, exist_ok=True)


def family_of(model: PreTrainedModel) -> Family | None:
    """The family a model object belongs to; None for those of transformers."""
    return next((family for family in FAMILIES.values() if isinstance(model, family.model)), None)
