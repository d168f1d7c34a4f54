"""A Valley-Eagle config.json in, a Qwen2 configuration with two vision encoders out.

The published files carry no encoder sizes: absent `vision_config` and `eagle_vision_config` mean the full-size SigLIP
and Qwen2-VL encoders. Keys of the original that change nothing at inference are kept as attributes and not read.
"""

import json
import os
from pathlib import Path
from typing import Any

from transformers import Qwen2Config, SiglipVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from .tiles import Geometry, parse_canvases

IMAGE_TOKEN = "<|image_pad|>"
PUBLISHED_IMAGE_TOKEN_ID = 151655
PROJECTORS = ("ovis_conv_adapter", "conv_adapter", "mlp_pixel_shuffle")
TOKENIZE_FUNCTIONS = ("softmax", "st_argmax")

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151679,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SIGLIP_DEFAULTS: dict[str, Any] = {
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
QWEN2VL_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "hidden_act": "quick_gelu",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}


class ValleyEagleConfig(Qwen2Config):
    """Configuration of Valley-Eagle-7B, Valley2-DPO and their kin (`architectures: ["ValleyQwen2ForCausalLM"]`).

    `image_token_id`: the token that stands for one visual token; where config.json does not say, it is read from the
    tokenizer files beside it. `projector_softmax_fp32`: take the projector's softmax over the visual vocabulary in
    float32; better numerics, but not what the published model computes in half precision.
    """

    model_type = "valley"

    def __init__(
        self,
        mm_vision_tower: str | None = "google/siglip-so400m-patch14-384",
        eagle_vision_tower: str | None = "Qwen/Qwen2-VL-7B-Instruct",
        vision_config: dict | SiglipVisionConfig | None = None,
        eagle_vision_config: dict | Qwen2VLVisionConfig | None = None,
        mm_projector_type: str = "ovis_conv_adapter",
        mlp_hidden_dim: int | None = 32000,
        tokenize_function: str = "softmax",
        pixelshuffle_downsample_ratio: int = 3,
        projector_softmax_fp32: bool = False,
        anyres: bool = True,
        grid_pinpoints: str | list = "(1x1),...,(3x3)",
        vit_crop_size: int = 384,
        num_patches_per_side: int = 14,
        only_crop_single_image: bool = True,
        use_special_start_end_token: bool = True,
        max_vision_token: int = 100000,
        max_pixels: int = 571536,
        frame_max_pixels: int = 153664,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.mm_vision_tower = mm_vision_tower
        self.eagle_vision_tower = eagle_vision_tower
        self.mm_projector_type = mm_projector_type
        self.mlp_hidden_dim = mlp_hidden_dim
        self.tokenize_function = tokenize_function
        self.pixelshuffle_downsample_ratio = pixelshuffle_downsample_ratio
        self.projector_softmax_fp32 = projector_softmax_fp32
        self.anyres = anyres
        self.grid_pinpoints = grid_pinpoints
        self.vit_crop_size = vit_crop_size
        self.num_patches_per_side = num_patches_per_side
        self.only_crop_single_image = only_crop_single_image
        self.use_special_start_end_token = use_special_start_end_token
        self.max_vision_token = max_vision_token
        self.max_pixels = max_pixels
        self.frame_max_pixels = frame_max_pixels
        self.image_token_id = PUBLISHED_IMAGE_TOKEN_ID if image_token_id is None else image_token_id
        text = {**TEXT_DEFAULTS, **kwargs}
        if "rope_parameters" not in text:
            text.setdefault("rope_theta", 1000000.0)
        super().__init__(**text)
        # Deliberately not `sub_configs`: a setting of the text model's attention (a function registered for
        # shared-prefix attention, say) must not reach the encoders.
        self.vision_config = _siglip_config(vision_config)
        self.eagle_vision_config = _qwen2vl_config(eagle_vision_config, self) if eagle_vision_tower else None
        _check(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ValleyEagleConfig":
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ValleyEagleConfig":
        if config_dict.get("image_token_id") is None:
            folder = Path(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "")
            config_dict = {**config_dict, "image_token_id": find_token_id(folder, IMAGE_TOKEN)}
        return super().from_dict(config_dict, **kwargs)

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a tile's edge after the projector: 27 patches give 14, or 9 when shuffled by 3."""
        patches = self.vision_config.image_size // self.vision_config.patch_size
        if self.mm_projector_type == "mlp_pixel_shuffle":
            return patches // self.pixelshuffle_downsample_ratio
        return (patches + 1) // 2

    def geometry(self) -> Geometry:
        eagle = self.eagle_vision_config
        return Geometry(
            crop_px=self.vit_crop_size,
            tokens_per_side=self.tokens_per_side,
            canvases=parse_canvases(self.grid_pinpoints, self.vit_crop_size),
            anyres=self.anyres,
            only_crop_single_image=self.only_crop_single_image,
            max_vision_token=self.max_vision_token,
            eagle=eagle is not None,
            eagle_patch_px=eagle.patch_size if eagle is not None else 14,
            eagle_merge=eagle.spatial_merge_size if eagle is not None else 2,
            eagle_temporal=eagle.temporal_patch_size if eagle is not None else 2,
        )


def find_token_id(folder: Path, token: str) -> int | None:
    """The id of a token, from the tokenizer files of a local folder; None where they do not name it."""
    if not folder.is_dir():
        folder = folder.parent if folder.is_file() else folder
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json", "vocab.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if name == "tokenizer_config.json":
            decoder = content.get("added_tokens_decoder") or {}
            ids = {entry["content"]: int(token_id) for token_id, entry in decoder.items()}
        elif name == "tokenizer.json":
            vocabulary = (content.get("model") or {}).get("vocab")
            ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
            ids.update({entry["content"]: entry["id"] for entry in content.get("added_tokens") or []})
        else:
            ids = content
        if token in ids:
            return ids[token]
    return None


def _siglip_config(given: dict | SiglipVisionConfig | None) -> SiglipVisionConfig:
    if isinstance(given, SiglipVisionConfig):
        return given
    return SiglipVisionConfig(**{**SIGLIP_DEFAULTS, **_without_model_type(given)})


def _qwen2vl_config(given: dict | Qwen2VLVisionConfig | None, text: Qwen2Config) -> Qwen2VLVisionConfig:
    """The Qwen2-VL encoder's sizes; its output is as wide as the text model."""
    if isinstance(given, Qwen2VLVisionConfig):
        return given
    return Qwen2VLVisionConfig(**{**QWEN2VL_DEFAULTS, "hidden_size": text.hidden_size, **_without_model_type(given)})


def _without_model_type(given: dict | None) -> dict[str, Any]:
    return {key: value for key, value in (given or {}).items() if key != "model_type"}


def _check(config: ValleyEagleConfig) -> None:
    """Refuses what this family cannot compute, before a weight is read."""
    if getattr(config, "only_navit", False):
        raise ValueError("config.json: only_navit is true, the layout of Valley2.5, which is another family")
    if config.mm_projector_type not in PROJECTORS:
        known = ", ".join(PROJECTORS)
        raise ValueError(
            f"config.json: expected mm_projector_type to be one of {known}, found {config.mm_projector_type!r}"
        )
    if config.tokenize_function not in TOKENIZE_FUNCTIONS:
        known = ", ".join(TOKENIZE_FUNCTIONS)
        raise ValueError(f"config.json: expected tokenize_function to be {known}, found {config.tokenize_function!r}")
    if config.vision_config.image_size != config.vit_crop_size:
        raise ValueError(
            f"config.json: expected vit_crop_size to equal vision_config.image_size, "
            f"found {config.vit_crop_size} and {config.vision_config.image_size}"
        )
    eagle = config.eagle_vision_config
    if eagle is not None and config.num_patches_per_side != config.tokens_per_side:
        raise ValueError(
            f"config.json: the projector gives {config.tokens_per_side} tokens along a tile's edge, "
            f"num_patches_per_side says {config.num_patches_per_side}"
        )
    if eagle is not None and eagle.hidden_size != config.hidden_size:
        raise ValueError(
            f"config.json: expected eagle_vision_config.hidden_size to equal hidden_size, "
            f"found {eagle.hidden_size} and {config.hidden_size}"
        )
