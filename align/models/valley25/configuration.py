"""A Valley2.5 config.json in, a Qwen3 configuration with a Qwen2-VL encoder out.

What config.json leaves open is read from the files beside it: the merger's width from the headers of the weights, the
placeholder's id from the tokenizer. Keys of Valley2 that have no meaning here (SigLIP, tiles, projector) are kept as
attributes and not read.
"""

import json
import os
from pathlib import Path
from typing import Any

from transformers import Qwen3Config
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from ..valley_eagle.configuration import IMAGE_TOKEN, PUBLISHED_IMAGE_TOKEN_ID, QWEN2VL_DEFAULTS, find_token_id
from ..valley_eagle.tiles import Geometry

MERGER_WEIGHT = "model.qwen2vl_vision_tower.merger.mlp.0.weight"
# "64k" in the paper; used only where neither config.json nor weights say.
INFERRED_MERGER_WIDTH = 65536

# Qwen3-8B-Base; the vocabulary is inferred.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


class Valley25Config(Qwen3Config):
    """Configuration of Valley2.5 (`architectures: ["ValleyQwen3ForCausalLM"]`).

    `navit_merger_hidden_dim`: width of the merger's hidden layer. `image_token_id`: the token that stands for one visual
    token. `max_pixels`: the most pixels of a single image, None where config.json does not say.
    """

    model_type = "valley"

    def __init__(
        self,
        eagle_vision_tower: str | None = "Qwen/Qwen2-VL-7B-Instruct",
        eagle_vision_config: dict | Qwen2VLVisionConfig | None = None,
        only_navit: bool = True,
        navit_merger_hidden_dim: int | None = None,
        use_special_start_end_token: bool = True,
        max_pixels: int | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.eagle_vision_tower = eagle_vision_tower
        self.only_navit = only_navit
        self.navit_merger_hidden_dim = navit_merger_hidden_dim or INFERRED_MERGER_WIDTH
        self.use_special_start_end_token = use_special_start_end_token
        self.max_pixels = max_pixels
        self.image_token_id = PUBLISHED_IMAGE_TOKEN_ID if image_token_id is None else image_token_id
        text = {**TEXT_DEFAULTS, **kwargs}
        if "rope_parameters" not in text:
            text.setdefault("rope_theta", 1000000.0)
        super().__init__(**text)
        # Deliberately not `sub_configs`: a setting of the text model's attention must not reach the encoder.
        self.eagle_vision_config = _qwen2vl_config(eagle_vision_config, self.hidden_size)
        _check(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "Valley25Config":
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Valley25Config":
        folder = Path(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "")
        found = {
            "image_token_id": lambda: find_token_id(folder, IMAGE_TOKEN),
            "navit_merger_hidden_dim": lambda: find_merger_width(folder),
        }
        missing = {name: find() for name, find in found.items() if config_dict.get(name) is None}
        return super().from_dict({**config_dict, **missing}, **kwargs)

    def geometry(self) -> Geometry:
        """Valley-Eagle's geometry, of which only what concerns the Qwen2-VL encoder is used."""
        eagle = self.eagle_vision_config
        return Geometry(
            crop_px=384,
            tokens_per_side=14,
            canvases=((384, 384),),
            anyres=False,
            only_crop_single_image=True,
            max_vision_token=0,
            eagle=True,
            eagle_patch_px=eagle.patch_size,
            eagle_merge=eagle.spatial_merge_size,
            eagle_temporal=eagle.temporal_patch_size,
        )


def find_merger_width(folder: Path) -> int | None:
    """The merger's width, from the header of the safetensors file that holds it; None where there is none."""
    index = folder / "model.safetensors.index.json"
    name: str | None = "model.safetensors"
    if index.is_file():
        name = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(MERGER_WEIGHT)
    if name is None or not (folder / name).is_file():
        return None
    with (folder / name).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header[MERGER_WEIGHT]["shape"][0] if MERGER_WEIGHT in header else None


def _qwen2vl_config(given: dict | Qwen2VLVisionConfig | None, width: int) -> Qwen2VLVisionConfig:
    """The encoder's sizes; its output is as wide as the text model."""
    if isinstance(given, Qwen2VLVisionConfig):
        return given
    sizes = {key: value for key, value in (given or {}).items() if key != "model_type"}
    return Qwen2VLVisionConfig(**{**QWEN2VL_DEFAULTS, "hidden_size": width, **sizes})


def _check(config: Valley25Config) -> None:
    """Refuses what this family cannot compute, before a weight is read."""
    if not config.only_navit:
        raise ValueError("config.json: expected only_navit true; SigLIP beside the encoder on Qwen3 is not known here")
    if config.eagle_vision_config.hidden_size != config.hidden_size:
        raise ValueError(
            f"config.json: expected eagle_vision_config.hidden_size to equal hidden_size, "
            f"found {config.eagle_vision_config.hidden_size} and {config.hidden_size}"
        )
