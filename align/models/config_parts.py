"""What the configurations of our families share: sizes of published parts, encoders of their own, ids of tokens.

Published config files carry no sizes of encoders and no ids of image tokens; both are filled in here.
"""

import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

EncoderConfig = TypeVar("EncoderConfig", bound=PreTrainedConfig)

QWEN2_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SIGLIP_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": True,
}
CLIP_VIT_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
QWEN2VL_ENCODER: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "hidden_act": "quick_gelu",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}


def text_settings(published: dict[str, Any], given: dict[str, Any], *, rope_theta: float) -> dict[str, Any]:
    """Keywords of a text model's configuration: what is given,
    and the published sizes and base of the rotary angles."""
    settings = {**published, **given}
    return settings if "rope_parameters" in settings else {"rope_theta": rope_theta, **settings}


def encoder_config(
    kind: type[EncoderConfig], given: dict[str, Any] | EncoderConfig | None, published: dict[str, Any]
) -> EncoderConfig:
    """An encoder's configuration: as it is given, what a dictionary leaves open as published.

    Families keep it out of `sub_configs` deliberately: a setting of the text model's attention (a function registered
    for shared-prefix attention, say) must not reach the encoders.
    """
    if isinstance(given, kind):
        return given
    sizes = {key: value for key, value in dict(given or {}).items() if key != "model_type"}
    return kind(**{**published, **sizes})


def qwen2vl_config(given: dict[str, Any] | Qwen2VLVisionConfig | None, width: int) -> Qwen2VLVisionConfig:
    """That of a Qwen2-VL encoder. Raises ValueError where its output is not as wide as the text model, `width`."""
    config = encoder_config(Qwen2VLVisionConfig, given, {**QWEN2VL_ENCODER, "hidden_size": width})
    if config.hidden_size != width:
        raise ValueError(
            f"config.json: expected eagle_vision_config.hidden_size to equal hidden_size, "
            f"found {config.hidden_size} and {width}"
        )
    return config


class TokenIdsBeside:
    """Mixin in front of a configuration; token ids that config.json lacks are read from
    the tokenizer files beside it."""

    token_keys: ClassVar[dict[str, str]] = {}
    """Configuration keys of token ids, and the tokens they are the ids of."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As of the base class; remembers the folder, whose tokenizer knows ids that the file lacks."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of the base class, from keys of any version of the layout."""
        unknown = {key: token for key, token in cls.token_keys.items() if config_dict.get(key) is None}
        found = find_token_ids(folder_of(config_dict, kwargs), list(unknown.values())) if unknown else {}
        ids = {key: found.get(token) for key, token in unknown.items()}
        return super().from_dict({**config_dict, **ids}, **kwargs)  # type: ignore[misc]


def folder_of(config_dict: dict[str, Any], keywords: dict[str, Any]) -> Path:
    """The folder that a configuration is being read from; one without files where that is not known."""
    folder = Path(keywords.get("name_or_path") or config_dict.get("_name_or_path") or "")
    return folder.parent if folder.is_file() else folder


def find_token_ids(folder: Path, tokens: list[str]) -> dict[str, int]:
    """The ids of those of the tokens that the tokenizer files of a local folder name."""
    known: dict[str, int] = {}
    for name in ("vocab.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if name == "tokenizer.json":
            vocabulary = (content.get("model") or {}).get("vocab")
            known.update(vocabulary if isinstance(vocabulary, dict) else {})
            known.update({entry["content"]: entry["id"] for entry in content.get("added_tokens") or []})
        elif name == "tokenizer_config.json":
            decoder = content.get("added_tokens_decoder") or {}
            known.update({entry["content"]: int(token_id) for token_id, entry in decoder.items()})
        else:
            known.update(content)
    return {token: known[token] for token in tokens if token in known}
