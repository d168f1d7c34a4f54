"""A random Valley-Eagle with a token per byte, so that every text can be written, read and judged."""

from __future__ import annotations

from pathlib import Path

import torch

from align.models.valley_eagle import ValleyProcessor
from tests.models import tiny_valley
from tests.tiny_models import byte_tokenizer
from tests.vllm.test_random_models import EAGLE, WIDE

# All tokens: with so many alternatives a server shows every option.
VOCABULARY = 264


def save_byte_eagle(path: Path, seed: int = 0, *, writes: dict[str, float] | None = None) -> Path:
    """A checkpoint folder. `writes`: characters with weights of their logits; all others' are 0. None: any bytes."""
    words = byte_tokenizer()
    words.add_special_tokens({"additional_special_tokens": tiny_valley.SPECIAL[1:]})
    ids = {
        f"{kind}_token_id": words.convert_tokens_to_ids(token)
        for kind, token in (("eos", "<|im_end|>"), ("pad", "<|endoftext|>"), ("image", "<|image_pad|>"))
    }
    assert len(words) == VOCABULARY
    changes = {"vocab_size": len(words), **ids, **WIDE, "eagle_vision_config": EAGLE}
    model = tiny_valley.model(seed, **changes)
    if writes is not None:
        liked = torch.zeros(len(words), 1)
        liked[words.convert_tokens_to_ids(list(writes)), 0] = torch.tensor(list(writes.values()))
        with torch.no_grad():
            model.lm_head.weight.mul_(liked)
    model.save_pretrained(path)
    ValleyProcessor(words, config=tiny_valley.config(**changes)).save_pretrained(path)
    return path
