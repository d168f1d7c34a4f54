"""Valley-Eagle for vLLM: SigLIP's tiles, where there is one the Qwen2-VL encoder's patches, vLLM's Qwen2."""

from collections.abc import Iterator
from typing import Any

from align.engines.vllm.images import Images, with_images
from align.engines.vllm.model import VisualModel


def sizes_px(processor: Any) -> Iterator[tuple[int, int]]:
    """Canvases, on which no token shows padding, as large as they are and as large as the
    second encoder sees images."""
    eagle = processor.geometry.eagle
    for width, height in processor.geometry.canvases:
        yield width, height
        if eagle:
            yield eagle.sizes(width * 8, height * 8, processor.min_pixels, processor.max_pixels)[1]
            yield width * 8, height * 8


@with_images(
    Images(
        flat={
            "pixel_values": lambda arrays: arrays["tiles_per_image"],
            "eagle_pixel_values": lambda arrays: arrays["image_grid_thw"].prod(dim=-1),
        },
        sizes_px=sizes_px,
    )
)
class ValleyEagle(VisualModel):
    """`architectures: ["ValleyQwen2ForCausalLM"]`."""

    text_architecture = "Qwen2ForCausalLM"
