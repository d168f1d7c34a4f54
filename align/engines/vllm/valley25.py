"""Valley2.5 for vLLM: the Qwen2-VL encoder with a wide merger, vLLM's Qwen3."""

import math
from collections.abc import Iterator
from typing import Any

from align.engines.vllm.images import Images, with_images
from align.engines.vllm.model import VisualModel


def sizes_px(processor: Any) -> Iterator[tuple[int, int]]:
    """Squares of as many pixels as the encoder sees of an image, and halves of that."""
    side = math.isqrt(processor.max_pixels)
    while side >= processor.geometry.factor:
        yield side, side
        side //= 2


@with_images(
    Images(
        flat={"pixel_values": lambda arrays: arrays["image_grid_thw"].prod(dim=-1)},
        sizes_px=sizes_px,
    )
)
class Valley25(VisualModel):
    """`architectures: ["ValleyQwen3ForCausalLM"]`."""

    text_architecture = "Qwen3ForCausalLM"
