"""360VL for vLLM: five crops of an image through CLIP and two C-Abstractors, vLLM's Llama."""

from align.engines.vllm.images import Images, with_images
from align.engines.vllm.model import VisualModel


@with_images(
    Images(
        flat={"pixel_values": lambda arrays: arrays["pictures_per_image"]},
        sizes_px=lambda processor: [(processor.side, processor.side)],
        most=1,
    )
)
class VL360(VisualModel):
    """`architectures: ["QH360_VL_LlamaForCausalLM"]`."""

    text_architecture = "LlamaForCausalLM"
