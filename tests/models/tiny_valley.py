"""Tiny random Valley-Eagle folders for tests: 112-pixel tiles, word-level tokenizer, a few ten thousand weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from align.models.valley_eagle import ValleyEagleConfig, ValleyProcessor, ValleyQwen2ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<|image_pad|>"]
WORDS = ["<unk>", "system", "user", "assistant", "what", "is", "this", "a", "cat", "dog", "red", "blue", "one", "two"]
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}
QWEN2VL = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}


def tokenizer():
    """One token a word; the ids of the special tokens are nothing like the published ones."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, *SPECIAL])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return fast


def config(*, eagle=True, **changes):
    words = tokenizer()
    settings = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": words.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": words.convert_tokens_to_ids("<|endoftext|>"),
        "image_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        "vision_config": SIGLIP,
        "vit_crop_size": 112,
        "num_patches_per_side": 4,
        "mlp_hidden_dim": 20,
        "grid_pinpoints": "(1x1),...,(2x2)",
        "eagle_vision_tower": "Qwen/Qwen2-VL-7B-Instruct" if eagle else None,
        "eagle_vision_config": QWEN2VL if eagle else None,
    }
    return ValleyEagleConfig(**{**settings, **changes})


def model(seed=0, **changes):
    """Random weights large enough that images matter to the logits."""
    torch.manual_seed(seed)
    made = ValleyQwen2ForCausalLM(config(**changes))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.7 / parameter.shape[-1] ** 0.5)
    return made.eval()


def processor(**changes):
    settings = {
        name: changes.pop(name) for name in ("text_only_image", "default_system", "min_pixels") if name in changes
    }
    return ValleyProcessor(tokenizer(), config=config(**changes), **settings)


def folder(path: Path, **changes) -> Path:
    """A checkpoint folder as transformers saves it."""
    model(**changes).save_pretrained(path)
    processor(**changes).save_pretrained(path)
    return path
