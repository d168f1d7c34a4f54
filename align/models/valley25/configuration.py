"""A Valley2.5 config.json in, a Qwen3 configuration with a Qwen2-VL encoder out.

What config.json leaves open is read from the files beside it: the merger's width from the headers of the weights, the
placeholder's id from the tokenizer. Keys of Valley2 that have no meaning here (SigLIP, tiles, projector) are kept as
attributes and not read.
"""

import json
from pathlib import Path
from typing import Any

from transformers import Qwen3Config
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from ..config_parts import TokenIdsBeside, folder_of, qwen2vl_config, text_settings
from ..qwen2vl import PatchGeometry
from ..valley_chat import IMAGE_TOKEN, PUBLISHED_IMAGE_TOKEN_ID

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


class Valley25Config(TokenIdsBeside, Qwen3Config):
    """Configuration of Valley2.5 (`architectures: ["ValleyQwen3ForCausalLM"]`).

    `navit_merger_hidden_dim`: width of the merger's hidden layer. `image_token_id`:
    the token that stands for one visual
    token. `max_pixels`: the most pixels of a single image, None where config.json does not say.
    """

    model_type = "valley"
    token_keys = {"image_token_id": IMAGE_TOKEN}  # noqa: RUF012

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
        super().__init__(**text_settings(TEXT_DEFAULTS, kwargs, rope_theta=1000000.0))
        self.eagle_vision_config = qwen2vl_config(eagle_vision_config, self.hidden_size)
        if not only_navit:
            raise ValueError(
                "config.json: expected only_navit true; SigLIP beside the encoder on Qwen3 is not known here"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Valley25Config":
        """As of the base class, from keys of any version of the layout."""
        if config_dict.get("navit_merger_hidden_dim") is None:
            width = find_merger_width(folder_of(config_dict, kwargs))
            config_dict = {**config_dict, "navit_merger_hidden_dim": width}
        return super().from_dict(config_dict, **kwargs)

    def geometry(self) -> PatchGeometry:
        """Patch sizes and merging of the vision tower."""
        return PatchGeometry.of(self.eagle_vision_config)


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
