"""A Valley-Eagle of full size with random weights, made on the device, and the floating-point operations of its step.

Inputs are made by the real processor with the tokenizer of the tests' golden checkpoint, whose image geometry is that
of the published model; ids are therefore small, which changes no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from align import accelerator
from align.models.load import load_processor, read_config
from align.models.modules import freeze_parts
from align.models.valley_eagle import ValleyEagleConfig, ValleyQwen2ForCausalLM

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "valley_eagle_tiny"
SIZES = ("valley-eagle-7b", "valley-eagle-tiny")
MAX_PIXELS = 571_536
# Dense bfloat16 operations per second, as the makers state them.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def build_valley(size: str, device: str, dtype: torch.dtype, num_layers: int | None = None) -> tuple[Any, Any]:
    """The model, its vision towers frozen as in Valley2-DPO's recipe, and its processor; with fewer layers of the
    language model and of both towers where `num_layers` says so."""
    processor = load_processor(GOLDEN, max_pixels=MAX_PIXELS)
    if size == "valley-eagle-tiny":
        config = ValleyEagleConfig.from_dict(read_config(GOLDEN), name_or_path=str(GOLDEN))
    else:
        config = ValleyEagleConfig(image_token_id=processor.image_token_id)
    if num_layers is not None:
        config.num_hidden_layers, config.layer_types = num_layers, config.layer_types[:num_layers]
        config.vision_config.num_hidden_layers = config.eagle_vision_config.depth = num_layers
    config._attn_implementation = "sdpa"
    accelerator.avoid_cudnn_attention()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = ValleyQwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    freeze_parts(model, ["vision"])
    return model, processor


def prompt_of_one_image(processor: Any, width: int = 800, height: int = 600) -> dict[str, torch.Tensor]:
    """The processor's output for one photo-sized image and a short question."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    question = "Describe the picture in detail, and say what is unusual about it."
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[[Image.fromarray(pixels)]], text=[text], return_tensors="pt", add_special_tokens=False)
    return dict(inputs)


@dataclass(frozen=True)
class Work:
    """What one pair costs: tokens of the language model, and floating-point operations that a step cannot do without.

    A multiplication and an addition count as two; recomputation by gradient checkpointing does not count.
    """

    prompt_tokens: int
    response_tokens: int
    flops: float

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + 2 * self.response_tokens


def work_of(model: Any, inputs: dict[str, torch.Tensor], response_tokens: int) -> Work:
    """The cost of a pair in the shared layout, vision towers forward only, everything else forward and backward."""
    prompt = int(inputs["attention_mask"].sum())
    text = _text_flops(model, prompt, response_tokens)
    towers, projector = _image_flops(model, inputs)
    return Work(prompt, response_tokens, 3 * (text + projector) + towers)


def _text_flops(model: Any, prompt: int, response: int) -> float:
    """Forward of the language model over `[prompt | response | response]` and of the head over the responses."""
    config = model.config
    layers = _weights(model, lambda name: ".layers." in name and "vision" not in name)
    # Of the last layer only keys and values are made of the prompt, but for its last token.
    keys = _weights(model, lambda name: ".layers.0.self_attn.k_proj" in name and "vision" not in name)
    unread = (layers / config.num_hidden_layers - 2 * keys) * (prompt - 1)
    # Keys that a query sees: on average half of its own sequence, and the prompt where it stands behind one.
    seen = prompt * prompt / 2 + 2 * response * (prompt + response / 2)
    attention = 4 * config.num_hidden_layers * config.hidden_size * seen
    head = 2 * config.vocab_size * config.hidden_size * 2 * response
    return 2 * (layers * (prompt + 2 * response) - unread) + attention + head


def _image_flops(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Forward of both towers, and of the projector, over all images."""
    siglip, eagle = model.config.vision_config, model.config.eagle_vision_config
    tiles, side = len(inputs["pixel_values"]), siglip.image_size // siglip.patch_size
    patches = side * side
    towers = (
        2 * _weights(model, lambda name: "vision_tower.vision_tower" in name and ".head." not in name) * tiles * patches
    )
    towers += 4 * siglip.num_hidden_layers * siglip.hidden_size * tiles * patches**2
    eagle_patches = len(inputs["eagle_pixel_values"])
    blocks = _weights(model, lambda name: "qwen2vl_vision_tower" in name and ".merger." not in name)
    merger = _weights(model, lambda name: "qwen2vl_vision_tower.merger" in name)
    towers += 2 * blocks * eagle_patches + 2 * merger * eagle_patches / eagle.spatial_merge_size**2
    towers += 4 * eagle.depth * eagle.embed_dim * eagle_patches**2
    projector = 2 * _weights(model, lambda name: "mm_projector" in name) * tiles * model.config.tokens_per_side**2
    return towers, projector


def _weights(model: Any, wanted: Callable[[str], bool]) -> int:
    """How many weights stand in matrices and kernels whose names are wanted; vectors cost next to nothing."""
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and wanted(name))


def peak_flops() -> float | None:
    """What the GPU can do a second in bfloat16, or None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((value for key, value in PEAK_FLOPS.items() if key in name), None)
