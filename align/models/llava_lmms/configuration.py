"""A config.json of lmms-lab in, a Qwen2 configuration with a SigLIP encoder out.

The published files carry no encoder sizes: an absent `vision_config` means SigLIP-so400m at 384 pixels without its last
layer, 26 of 27. `model_type` is "llava" in some folders, a name that transformers gives to another model, and
"llava_qwen" in others; `architectures` decides. Keys that change nothing at inference are
kept as attributes and not read.
"""

import re
from typing import Any

from transformers import Qwen2Config, SiglipVisionConfig

from ..config_parts import QWEN2_7B, SIGLIP_SO400M, encoder_config, text_settings
from ..valley_eagle.tiles import parse_canvases

PUBLISHED_TOWER = "siglip-so400m-patch14-384"
PUBLISHED_IMAGE_TOKEN_ID = 151646
PINPOINTS = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]

VOCABULARY = 152064
SIGLIP_DEFAULTS = {**SIGLIP_SO400M, "num_hidden_layers": 26, "vision_use_head": False}
# What of the original's many switches is computed here; all published OneVision and Critic
# checkpoints have these values.
SUPPORTED = {
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_newline_position": ("one_token",),
    "mm_spatial_pool_mode": ("bilinear",),
    "mm_resampler_type": (None,),
}


class LlavaQwenConfig(Qwen2Config):
    """Configuration of LLaVA-OneVision and LLaVA-Critic (`architectures: ["LlavaQwenForCausalLM"]`).

    `image_token_index`: the row of the embedding that stands for one visual token in `input_ids`. The tokenizer has no
    such token and the row is never trained; the original's sentinel, -200, is no row at all. `mm_spatial_pool_stride`:
    how much smaller a video frame's map of tokens is, along each side.
    """

    model_type = "llava_qwen"

    def __init__(
        self,
        mm_vision_tower: str | None = "google/siglip-so400m-patch14-384",
        vision_config: dict | SiglipVisionConfig | None = None,
        mm_projector_type: str = "mlp2x_gelu",
        mm_patch_merge_type: str = "spatial_unpad",
        mm_newline_position: str = "one_token",
        mm_spatial_pool_mode: str = "bilinear",
        mm_spatial_pool_stride: int | None = None,
        mm_resampler_type: str | None = None,
        image_aspect_ratio: str = "anyres_max_9",
        image_grid_pinpoints: str | list | None = None,
        image_token_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.mm_vision_tower = mm_vision_tower
        self.mm_projector_type = mm_projector_type
        self.mm_patch_merge_type = mm_patch_merge_type
        self.mm_newline_position = mm_newline_position
        self.mm_spatial_pool_mode = mm_spatial_pool_mode
        self.mm_spatial_pool_stride = mm_spatial_pool_stride or 2
        self.mm_resampler_type = mm_resampler_type
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = PINPOINTS if image_grid_pinpoints is None else image_grid_pinpoints
        self.image_token_index = PUBLISHED_IMAGE_TOKEN_ID if image_token_index is None else image_token_index
        super().__init__(**text_settings({**QWEN2_7B, "vocab_size": VOCABULARY}, kwargs, rope_theta=1000000.0))
        if not vision_config and PUBLISHED_TOWER not in str(mm_vision_tower):
            raise ValueError(
                f"config.json: expected mm_vision_tower to be {PUBLISHED_TOWER}, found {mm_vision_tower!r}"
            )
        self.vision_config = encoder_config(SiglipVisionConfig, vision_config, SIGLIP_DEFAULTS)
        _check(self)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes "llava" for this model's type, which transformers would take for another model's,
        tokenizer included."""
        content, rest = super().get_config_dict(*args, **kwargs)
        return {**content, "model_type": cls.model_type}, rest

    @property
    def image_token_id(self) -> int:
        """The placeholder's id, by the name that transformers uses."""
        return self.image_token_index

    @property
    def patches_per_side(self) -> int:
        """Tokens along the edge of a tile: 27 of 384 pixels."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def projector_depth(self) -> int:
        """Linear layers of the projector: 2 of `mlp2x_gelu`."""
        found = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.mm_projector_type)
        if found is None:
            raise ValueError(
                f"config.json: expected mm_projector_type like mlp2x_gelu, found {self.mm_projector_type!r}"
            )
        return int(found.group(1))


def _check(config: LlavaQwenConfig) -> None:
    """Refuses what this family cannot compute, before a weight is read."""
    for name, known in SUPPORTED.items():
        if getattr(config, name) not in known:
            raise ValueError(f"config.json: expected {name} to be {known[0]!r}, found {getattr(config, name)!r}")
    assert config.projector_depth > 0
    canvases = parse_canvases(config.image_grid_pinpoints, config.vision_config.image_size)
    edge = config.vision_config.image_size
    if any(width % edge or height % edge for width, height in canvases):
        raise ValueError(f"config.json: expected image_grid_pinpoints to be multiples of {edge} pixels")
    if not 0 <= config.image_token_index < config.vocab_size:
        raise ValueError(
            f"config.json: expected image_token_index below vocab_size {config.vocab_size}, "
            f"found {config.image_token_index}"
        )
