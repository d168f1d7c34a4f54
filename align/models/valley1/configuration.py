"""A Valley 1 or Chinese-Valley config.json in, a Llama configuration with a CLIP encoder and a way of pooling out.

The published files name the encoder but not its sizes: absent `vision_config` means CLIP ViT-L/14 at 224 pixels. Ids of
the image tokens depend on the order in which they were added, so they are looked up in the tokenizer files.
"""

from typing import Any

from transformers import ChineseCLIPVisionConfig, CLIPVisionConfig, LlamaConfig

from ..config_parts import CLIP_VIT_L, TokenIdsBeside, encoder_config

PATCH_TOKEN, FRAME_TOKEN = "<im_patch>", "<vi_frame>"


class ValleyLlamaConfig(TokenIdsBeside, LlamaConfig):
    """Configuration of Valley 1 (`architectures: ["ValleyLlamaForCausalLM"]`).

    How patches are pooled over time is `pooling`: `use_delta_transformer` and `use_patch_importance_pooling` say so in
    the published files, else it is the mean. The original never reads `patch_pooling_method`; nor does this.
    """

    model_type = "valley"
    token_keys = {"image_token_id": PATCH_TOKEN, "video_token_id": FRAME_TOKEN}  # noqa: RUF012

    def __init__(
        self,
        mm_vision_tower: str = "openai/clip-vit-large-patch14",
        mm_hidden_size: int = 1024,
        mm_vision_select_layer: int = -2,
        vision_config: dict | CLIPVisionConfig | ChineseCLIPVisionConfig | None = None,
        use_patch_importance_pooling: bool = False,
        use_delta_transformer: bool = False,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.mm_vision_tower = mm_vision_tower
        self.mm_hidden_size = mm_hidden_size
        self.mm_vision_select_layer = mm_vision_select_layer
        self.use_patch_importance_pooling = use_patch_importance_pooling
        self.use_delta_transformer = use_delta_transformer
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        super().__init__(**kwargs)
        clip: type[CLIPVisionConfig | ChineseCLIPVisionConfig]
        clip = ChineseCLIPVisionConfig if self.is_chinese else CLIPVisionConfig
        self.vision_config = encoder_config(clip, vision_config, CLIP_VIT_L)
        _check(self)

    @property
    def is_chinese(self) -> bool:
        """Whether the encoder is Chinese-CLIP, which the original too reads from the tower's name."""
        return "chinese" in self.mm_vision_tower

    @property
    def pooling(self) -> str:
        """`mean`, `importance` or `delta`."""
        if self.use_delta_transformer:
            return "delta"
        return "importance" if self.use_patch_importance_pooling else "mean"

    @property
    def num_patches(self) -> int:
        """Patches of a picture, 256 in the published models."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2


class ChineseValleyConfig(ValleyLlamaConfig):
    """Configuration of Chinese-Valley (`architectures: ["LlavaLlamaForCausalLM"]` with a Chinese-CLIP tower).

    Its files say `model_type: "llava"`, a name that transformers gives to another model,
    so `AutoConfig` cannot open them.
    """

    model_type = "chinese_valley"

    def __init__(self, mm_vision_tower: str = "OFA-Sys/chinese-clip-vit-large-patch14", **kwargs: Any) -> None:
        super().__init__(mm_vision_tower=mm_vision_tower, **kwargs)
        if not self.is_chinese:
            raise ValueError(
                f"config.json: LlavaLlamaForCausalLM with the tower {mm_vision_tower!r} is the first LLaVA, which is"
                " not supported in this format; use its copy in transformers' own format (llava-hf)"
            )


def _check(config: ValleyLlamaConfig) -> None:
    """Refuses what this family cannot compute, before a weight is read."""
    if config.use_delta_transformer and config.use_patch_importance_pooling:
        raise ValueError(
            "config.json: use_delta_transformer and use_patch_importance_pooling are both true; expected one pooling"
        )
    if config.vision_config.hidden_size != config.mm_hidden_size:
        raise ValueError(
            "config.json: expected mm_hidden_size to equal vision_config.hidden_size, "
            f"found {config.mm_hidden_size} and {config.vision_config.hidden_size}"
        )
