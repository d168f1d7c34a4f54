"""Tiny random models of several families with inputs for ragged prompts, images included; fp32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from align.models.load import load_model, load_processor
from tests.tiny_models import random_image

VOCAB = 120
IMAGE_TOKEN = 118
VISION_START = 117
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

Case = tuple[Any, dict[str, torch.Tensor]]


def text_prompts(lengths: tuple[int, ...] = (5, 9, 3)) -> dict[str, torch.Tensor]:
    """Right-padded random prompts of these lengths."""
    ids = torch.randint(3, 100, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def qwen2() -> Case:
    return Qwen2ForCausalLM(Qwen2Config(**TEXT)), text_prompts()


def llama() -> Case:
    return LlamaForCausalLM(LlamaConfig(**TEXT)), text_prompts()


def llava_onevision() -> Case:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[28, 28], [28, 56]],
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    sizes = torch.tensor([[28, 28], [28, 56]])
    # Base and tiles: two patches for a square image, three for one twice as wide.
    pixel_values = torch.randn(2, 3, 3, 28, 28)
    pixel_values[0, 2] = 0
    # The base gives 4 tokens; the tiles 2 rows of 2 (or 4) with a newline token at the end of each row.
    counts = (4 + 2 * 3, 4 + 2 * 5)
    return model, {**_with_image_tokens(counts, extra=(4, 6)), "pixel_values": pixel_values, "image_sizes": sizes}


def _with_image_tokens(counts: tuple[int, ...], extra: tuple[int, ...], start: bool = False) -> dict[str, torch.Tensor]:
    """Prompts `text, image tokens, text` with this many image tokens and this much text behind them."""
    rows = []
    for count, text in zip(counts, extra, strict=True):
        lead = [VISION_START] if start else []
        rows.append([5, 6, *lead, *[IMAGE_TOKEN] * count, *torch.randint(3, 100, (text,)).tolist()])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _qwen_vl_inputs(patch_dim: int) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    inputs = _with_image_tokens((4, 8), extra=(5, 2), start=True)
    return {
        **inputs,
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(int(grid.prod(dim=1).sum()), patch_dim),
        "image_grid_thw": grid,
    }


SPECIAL = {"image_token_id": IMAGE_TOKEN, "video_token_id": 119, "vision_start_token_id": VISION_START}


def qwen2_vl() -> Case:
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        **SPECIAL,
    )
    return Qwen2VLForConditionalGeneration(config), _qwen_vl_inputs(3 * 2 * 4 * 4)


def qwen2_5_vl() -> Case:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **SPECIAL)
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_vl_inputs(3 * 2 * 4 * 4)


def qwen3_vl() -> Case:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": MROPE}, vision_config=vision, **SPECIAL
    )
    return Qwen3VLForConditionalGeneration(config), _qwen_vl_inputs(3 * 2 * 4 * 4)


def valley_eagle() -> Case:
    """The golden checkpoint with its own processor: a small and a wide image, questions of unequal length."""
    folder = Path(__file__).parents[1] / "golden" / "valley_eagle_tiny"
    processor = load_processor(folder, max_pixels=28 * 28 * 16)
    texts = ["What is it?", "How many of them are there, and where?"]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
        images=[[random_image(1, 60, 50)], [random_image(2, 200, 60)]],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    return load_model(folder, dtype=torch.float32), dict(inputs)


def gemma3_sliding() -> Case:
    """Every second layer has a window of 4 tokens."""
    config = Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    return Gemma3ForCausalLM(config), text_prompts()


def mamba() -> Case:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config), text_prompts()


SUPPORTED: dict[str, Callable[[], Case]] = {
    f.__name__: f for f in (qwen2, llama, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, valley_eagle)
}


def make(build: Callable[[], Case], seed: int = 0) -> Case:
    """The model with weights large enough for clearly unequal predictions, in evaluation mode, and its prompts."""
    torch.manual_seed(seed)
    model, inputs = build()
    if build is valley_eagle:
        return model.eval(), inputs
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2 if "embed" in name else 0.15)
    return model.eval(), inputs
