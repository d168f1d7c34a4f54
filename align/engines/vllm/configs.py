"""What `AutoConfig` makes of a folder whose `model_type` transformers gives to another model."""

from typing import Any

from transformers import AutoConfig, LlavaConfig

import align.models  # noqa: F401  (registers our families)
from align.models.llava_lmms import LlavaQwenConfig


class LlavaOrLmms(LlavaConfig):
    """Stands for `model_type: "llava"`, which folders of lmms-lab share with transformers' Llava."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of the base class, from keys of any version of the layout."""
        is_lmms = "LlavaQwenForCausalLM" in (config_dict.get("architectures") or [])
        return (LlavaQwenConfig if is_lmms else LlavaConfig).from_dict(config_dict, **kwargs)


def register_configs() -> None:
    """Only within vLLM's processes: everywhere else `align.models.load` decides by `architectures`."""
    AutoConfig.register("llava", LlavaOrLmms, exist_ok=True)
