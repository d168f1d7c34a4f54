"""Tiny random vision-language models and processors for tests: real classes, real processors, a few thousand weights.

Everything is built from seeds in memory, needs no file and no network, and runs in milliseconds on one CPU core.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from align.models.no_torchvision import without_video

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte and the special tokens of a Qwen2 chat model (vocabulary of 261)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def llava_onevision_processor(tile_px: int = 28, tiles: int = 2) -> LlavaOnevisionProcessor:
    """A LLaVA-OneVision processor with Qwen2's chat form: square tiles of 14-pixel patches, grids up to tiles x tiles.

    A tile of k x k patches is k * k visual tokens; an image is its small version and its grid, with a token at the end
    of every line of the grid.
    """
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": tile_px, "width": tile_px}, image_grid_pinpoints=_grids(tile_px, tiles)
    )
    return without_video(LlavaOnevisionProcessor)(
        image_processor=image_processor,
        tokenizer=byte_tokenizer(),
        num_image_tokens=(tile_px // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def llava_onevision_config(
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int | None = None,
    vocab_size: int = 264,
    tied: bool = False,
    vision_hidden_size: int = 16,
    vision_layers: int = 2,
    tile_px: int = 28,
    tiles: int = 2,
) -> LlavaOnevisionConfig:
    """The configuration that goes with `llava_onevision_processor` of the same tiles."""
    tokenizer = byte_tokenizer()
    vision = SiglipVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=2 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=tile_px,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=_grids(tile_px, tiles),
        tie_word_embeddings=tied,
    )


def _grids(tile_px: int, tiles: int) -> list[list[int]]:
    return [[tile_px * rows, tile_px * columns] for rows in range(1, tiles + 1) for columns in range(1, tiles + 1)]


def llava_onevision(seed: int = 0, **sizes: int | bool) -> LlavaOnevisionForConditionalGeneration:
    """A random LLaVA-OneVision in float32 whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(llava_onevision_config(**sizes))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / parameter.shape[-1] ** 0.5)
    return model.eval()


def random_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """An RGB image of uniform noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_llava_onevision(folder: Path, seed: int = 0, **sizes: int | bool) -> Path:
    """Write a checkpoint folder of model and processor, as `load_model` and `load_processor` open it."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _saved(seed, **sizes).items():
        (folder / name).write_bytes(data)
    return folder


@functools.cache
def _saved(seed: int, **sizes: int | bool) -> dict[str, bytes]:
    """Every file of the folder: many tests want the same, and to make a model takes longer than to read one."""
    with tempfile.TemporaryDirectory() as folder:
        llava_onevision(seed, **sizes).save_pretrained(folder)
        llava_onevision_processor().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
