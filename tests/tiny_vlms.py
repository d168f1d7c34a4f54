"""Tiny random checkpoints of vision-language models that transformers brings, each with its own kind of processor.

Real classes with a few thousand weights, one byte a token, images of a few visual tokens. No file,
network or torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from align.models.no_torchvision import without_video
from align.models.pixtral_pil import PixtralProcessor
from tests import tiny_models

Built = tuple[PreTrainedModel, Any]

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
CHATML = tiny_models.CHAT_TEMPLATE
GEMMA_TEMPLATE = (
    "{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '[/INST]' if message['role'] == 'user' else '</s>' }}{% endfor %}"
)


def tokenizer(specials: list[str], *, eos: str, pad: str, **named: str) -> PreTrainedTokenizerFast:
    """One token a byte; `named` are special tokens that the processor asks for by an attribute's name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    every = dict.fromkeys([pad, eos, *specials, *named.values()])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in every])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, pad_token=pad, padding_side="left", extra_special_tokens=named
    )


def chatml_tokenizer(*specials: str, **named: str) -> PreTrainedTokenizerFast:
    return tokenizer(["<|im_start|>", *specials], eos="<|im_end|>", pad="<|endoftext|>", **named)


def ids_of(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The text model's keys that come from its tokenizer."""
    return {
        "vocab_size": len(words),
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def _qwen_vl(config_class: Any, model_class: Any, processor_class: Any, vision: dict[str, Any], **text: Any) -> Built:
    words = chatml_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    named = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config = config_class(
        text_config={**TEXT, **ids_of(words), "rope_parameters": MROPE, **text},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 4, **vision},
        tie_word_embeddings=False,
        **{key: words.convert_tokens_to_ids(token) for key, token in named.items()},
    )
    pixels = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    template = CHATML.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
    return model_class(config), without_video(processor_class)(pixels, words, chat_template=template)


def qwen2_vl() -> Built:
    vision = {"embed_dim": 16, "hidden_size": 32}
    return _qwen_vl(Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision)


def qwen2_5_vl() -> Built:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen_vl(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, vision)


def qwen3_vl(**text: Any) -> Built:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": text.get("hidden_size", TEXT["hidden_size"]),
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return _qwen_vl(Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, vision, **{"head_dim": 8} | text)


def qwen3_vl_moe(**text: Any) -> Built:
    """Experts: four, of which a token passes two. `text` goes before the sizes here."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": text.get("hidden_size", TEXT["hidden_size"]),
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    classes = (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, Qwen3VLProcessor)
    return _qwen_vl(*classes, vision, **experts | text)


def llava_onevision() -> Built:
    return tiny_models.llava_onevision(), tiny_models.llava_onevision_processor()


def internvl() -> Built:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = chatml_tokenizer(**named)
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **ids_of(words)},
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    pixels = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    template = CHATML.replace("<image>\n", "<IMG_CONTEXT>\n")
    processor = without_video(InternVLProcessor)(pixels, words, image_seq_length=4, chat_template=template)
    return InternVLForConditionalGeneration(config), processor


def gemma3() -> Built:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(["<bos>", "<start_of_turn>"], eos="<end_of_turn>", pad="<pad>", **named)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in named.items()}
    config = Gemma3Config(
        text_config={**TEXT, **ids_of(words), "head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2},
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        tie_word_embeddings=False,
    )
    pixels = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(pixels, words, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    return Gemma3ForConditionalGeneration(config), processor


def smolvlm() -> Built:
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    words = chatml_tokenizer(*places, **named)
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT, **ids_of(words)},
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    pixels = SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = without_video(SmolVLMProcessor)(
        pixels, words, None, image_seq_len=4, chat_template=CHATML.replace("<image>\n", "<image>")
    )
    return SmolVLMForConditionalGeneration(config), processor


def mistral3() -> Built:
    words = tokenizer(["<s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], eos="</s>", pad="<pad>")
    config = Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, **ids_of(words), "head_dim": 8, "sliding_window": None},
        vision_config={"model_type": "pixtral", **VISION, "image_size": 56, "patch_size": 4},
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    pixels = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    processor = PixtralProcessor(pixels, words, patch_size=4, spatial_merge_size=2, chat_template=MISTRAL_TEMPLATE)
    return Mistral3ForConditionalGeneration(config), processor


VLMS: dict[str, Callable[[], Built]] = {
    build.__name__: build
    for build in (llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, gemma3, smolvlm, mistral3)
}


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder of one of `VLMS`, with weights large enough for clearly unequal predictions."""
    torch.manual_seed(seed)
    model, processor = VLMS[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
