"""A 360VL config.json in, a Llama-3 configuration with a CLIP encoder and a projector out.

`mm_projector_config` of the published files names their own repository, from which the original reads the projector's
configuration once more; it stands in the same file, under `visual_projector_config`, and is taken from there. An absent
`vision_config` means CLIP ViT-L/14 at 336 pixels.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from ..config_parts import CLIP_VIT_L, TokenIdsBeside, encoder_config, text_settings

IMAGE_TOKEN = "<|reserved_special_token_44|>"
END_OF_TURN = "<|eot_id|>"

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


@dataclass(frozen=True)
class AbstractorConfig:
    """Sizes of a C-Abstractor: `depth` blocks before and behind the pooling to `num_queries` tokens,
    `mlp_depth` linears."""

    num_queries: int = 576
    depth: int = 3
    mlp_depth: int = 2
    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    pos_emb: bool = True
    num_eos_tokens: int = 0
    prenorm: bool = False

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "AbstractorConfig":
        """As of the base class, from keys of any version of the layout."""
        return cls(**{key: value for key, value in given.items() if key in cls.__dataclass_fields__})


class QH360VLConfig(TokenIdsBeside, LlamaConfig):
    """Configuration of 360VL (`architectures: ["QH360_VL_LlamaForCausalLM"]`).

    `proj_2`: true, as in the published models, means that the four crops of an image are put together before one
    projector reads them; absent, that it reads every crop for itself, and that a third projector is there for an image
    as a single picture; false, as the authors' trainer writes it, that this third one is all there is.
    `single_picture`: the model is used and trained with single pictures,
    the default of the authors' inference where `proj_2` is absent.
    """

    model_type = "QH_360VL"
    token_keys = {"image_token_id": IMAGE_TOKEN, "eot_token_id": END_OF_TURN}  # noqa: RUF012

    def __init__(
        self,
        mm_vision_tower: str = "openai/clip-vit-large-patch14-336",
        mm_hidden_size: int = 1024,
        mm_vision_select_layer: int = -2,
        mm_vision_select_feature: str = "patch",
        mm_projector_type: str = "c-abs",
        proj_2: bool | None = None,
        single_picture: bool = False,
        image_aspect_ratio: str | None = None,
        vision_config: dict | CLIPVisionConfig | None = None,
        visual_projector_config: dict | None = None,
        image_token_id: int | None = None,
        eot_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.mm_vision_tower = mm_vision_tower
        self.mm_hidden_size = mm_hidden_size
        self.mm_vision_select_layer = mm_vision_select_layer
        self.mm_vision_select_feature = mm_vision_select_feature
        self.mm_projector_type = mm_projector_type
        if proj_2 is not None:
            self.proj_2 = proj_2
        self.single_picture = single_picture or proj_2 is False
        self.image_aspect_ratio = image_aspect_ratio
        self.visual_projector_config = dict(visual_projector_config or {})
        self.image_token_id = image_token_id
        self.eot_token_id = eot_token_id
        super().__init__(**text_settings(TEXT_DEFAULTS, kwargs, rope_theta=500000.0))
        self.vision_config = encoder_config(CLIPVisionConfig, vision_config, {**CLIP_VIT_L, "image_size": 336})
        _check(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of the base class, from keys of any version of the layout."""
        if "num_queries" not in (config_dict.get("visual_projector_config") or {}):
            raise ValueError(
                "config.json: expected visual_projector_config with num_queries, which nothing else tells, found none"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def projector(self) -> AbstractorConfig:
        """The abstractor's settings."""
        return AbstractorConfig.from_dict(self.visual_projector_config)

    @property
    def joins_crops(self) -> bool:
        """Whether the four crops are put together before they are projected (the original's cc-plan, else sw-plan)."""
        return bool(getattr(self, "proj_2", False))

    @property
    def has_crop_projectors(self) -> bool:
        """Whether an image can be read as five crops."""
        return getattr(self, "proj_2", None) is not False

    @property
    def has_single_projector(self) -> bool:
        """Whether an image can be read as one picture."""
        return not self.joins_crops

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of every image, whatever its size: 1,152 in the published models."""
        return self.tokens_of(single_picture=self.single_picture)

    def tokens_of(self, *, single_picture: bool) -> int:
        """Visual tokens of an image that is read as one picture, or as five crops."""
        per_projection = self.projector.num_queries + self.projector.num_eos_tokens
        return per_projection * (1 if single_picture else 2 if self.joins_crops else 5)


def _check(config: QH360VLConfig) -> None:
    """Refuses what this family cannot compute, before a weight is read."""
    if config.single_picture and not config.has_single_projector:
        raise ValueError("config.json: single_picture needs the third projector, which proj_2: true has not")
    if config.mm_projector_type != "c-abs" or config.visual_projector_config.get("projector_type", "c-abs") != "c-abs":
        raise ValueError(f"config.json: expected mm_projector_type to be c-abs, found {config.mm_projector_type!r}")
    if config.mm_vision_select_feature != "patch":
        raise ValueError(
            f"config.json: expected mm_vision_select_feature to be patch, found {config.mm_vision_select_feature!r}"
        )
    if config.image_aspect_ratio not in (None, "pad", "square"):
        raise ValueError(f"config.json: expected image_aspect_ratio to be pad, found {config.image_aspect_ratio!r}")
    queries = config.projector.num_queries
    if isqrt(queries) ** 2 != queries:
        raise ValueError(f"config.json: expected num_queries to be a square number, found {queries}")
    widths = (config.vision_config.hidden_size, config.mm_hidden_size, config.projector.encoder_hidden_size)
    if len(set(widths)) > 1:
        raise ValueError(
            "config.json: expected vision_config.hidden_size, mm_hidden_size and encoder_hidden_size to be equal, "
            f"found {', '.join(map(str, widths))}"
        )
