"""A Valley-Eagle config.json in, a Qwen2 configuration with two vision encoders out.

The published files carry no encoder sizes: absent `vision_config` and `eagle_vision_config` mean the full-size SigLIP
and Qwen2-VL encoders. Keys of the original that change nothing at inference are kept as attributes and not read.
"""

from typing import Any

from transformers import Qwen2Config, SiglipVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from ..config_parts import QWEN2_7B, SIGLIP_SO400M, TokenIdsBeside, encoder_config, qwen2vl_config, text_settings
from ..qwen2vl import PatchGeometry
from ..valley_chat import IMAGE_TOKEN, PUBLISHED_IMAGE_TOKEN_ID
from .tiles import Geometry, parse_canvases

VOCABULARY = 151679
PROJECTORS = ("ovis_conv_adapter", "conv_adapter", "mlp_pixel_shuffle")
TOKENIZE_FUNCTIONS = ("softmax", "st_argmax")


class ValleyEagleConfig(TokenIdsBeside, Qwen2Config):
    """Configuration of Valley-Eagle-7B, Valley2-DPO and their kin (`architectures: ["ValleyQwen2ForCausalLM"]`).

    `image_token_id`: the token that stands for one visual token; where config.json does not say, it is read from the
    tokenizer files beside it. `projector_softmax_fp32`: take the projector's softmax over the visual vocabulary in
    float32; better numerics, but not what the published model computes in half precision.
    """

    model_type = "valley"
    token_keys = {"image_token_id": IMAGE_TOKEN}  # noqa: RUF012

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
        super().__init__(**text_settings({**QWEN2_7B, "vocab_size": VOCABULARY}, kwargs, rope_theta=1000000.0))
        self.vision_config = encoder_config(SiglipVisionConfig, vision_config, SIGLIP_SO400M)
        self.eagle_vision_config = qwen2vl_config(eagle_vision_config, self.hidden_size) if eagle_vision_tower else None
        _check(self)

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a tile's edge after the projector: 27 patches give 14, or 9 when shuffled by 3."""
        patches = self.vision_config.image_size // self.vision_config.patch_size
        if self.mm_projector_type == "mlp_pixel_shuffle":
            return patches // self.pixelshuffle_downsample_ratio
        return (patches + 1) // 2

    def geometry(self) -> Geometry:
        """Tiles and tokens as the configuration says."""
        return Geometry(
            crop_px=self.vit_crop_size,
            tokens_per_side=self.tokens_per_side,
            canvases=parse_canvases(self.grid_pinpoints, self.vit_crop_size),
            anyres=self.anyres,
            only_crop_single_image=self.only_crop_single_image,
            max_vision_token=self.max_vision_token,
            eagle=PatchGeometry.of(self.eagle_vision_config) if self.eagle_vision_config is not None else None,
        )


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
    if config.eagle_vision_config is not None and config.num_patches_per_side != config.tokens_per_side:
        raise ValueError(
            f"config.json: the projector gives {config.tokens_per_side} tokens along a tile's edge, "
            f"num_patches_per_side says {config.num_patches_per_side}"
        )
