"""LLaVA-OneVision and LLaVA-Critic in the lmms-lab layout for vLLM: SigLIP's views, vLLM's Qwen2."""

from collections.abc import Iterator
from typing import Any

from align.engines.vllm.images import Images, with_images
from align.engines.vllm.model import VisualModel
from align.models.llava_lmms.layout import ImageLayout


def sizes_px(processor: Any) -> Iterator[tuple[int, int]]:
    """The sizes that are to be tried for the most tokens."""
    yield from processor.tiling.canvases


def num_views(arrays: Any) -> Any:
    """How many views each image has."""
    layouts = arrays["image_layouts"]
    return layouts.new_tensor([ImageLayout(*row).num_views for row in layouts.tolist()])


@with_images(
    Images(
        flat={"pixel_values": num_views},
        sizes_px=sizes_px,
    )
)
class LlavaLmms(VisualModel):
    """`architectures: ["LlavaQwenForCausalLM"]`."""

    text_architecture = "Qwen2ForCausalLM"

    def placeholder_ids(self) -> list[int]:
        """The ids of the tokens that images stand in for."""
        return [self.config.image_token_index]
