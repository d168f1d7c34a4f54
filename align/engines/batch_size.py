"""How many items make a batch: what fits into memory, found by itself, and less after running out.

On a GPU the free memory is divided by what a token of a batch needs. On a CPU, where memory is not what limits, a batch
has about as many tokens as keep the cores busy. Running out of memory halves the batch for good.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from align import accelerator
from align.errors import UserError

# More does not make a CPU faster, and needs memory.
CPU_TOKENS = 8192
# Beyond this a GPU gains nothing from wider batches.
GPU_TOKENS = 131_072
# Of the free memory; the rest is for the vision towers, fragmentation and logits.
MEMORY_SHARE = 0.6


@dataclass
class BatchSizer:
    """`fixed`: items a batch, None: as memory allows. `num_halvings` counts how often memory ran out."""

    model: PreTrainedModel
    fixed: int | None = None
    num_halvings: int = 0
    _limit: int | None = None

    def num_items(self, prompt_tokens: int, new_tokens: int = 0) -> int:
        """Items in a batch, at least 1, of which each reads and then writes so many tokens."""
        if self.fixed is not None:
            count = self.fixed
        else:
            count = self._by_memory(prompt_tokens, new_tokens)
        return max(1, count if self._limit is None else min(count, self._limit))

    def halve(self, num_items: int) -> None:
        """After `num_items` ran out of memory; raises UserError when it was only one."""
        if num_items <= 1:
            raise UserError(
                "a single question does not fit into memory",
                fix="let images have fewer tokens (model.processor), or ask for fewer or shorter responses",
            )
        self.num_halvings += 1
        self._limit = num_items // 2
        gc.collect()
        accelerator.empty_cache()

    def _by_memory(self, prompt_tokens: int, new_tokens: int) -> int:
        device = next(self.model.parameters()).device
        free = accelerator.free_memory(device)
        if free is None:
            return CPU_TOKENS // prompt_tokens
        cached, working = token_bytes(self.model)
        needed = prompt_tokens * (cached + working) + new_tokens * cached
        return min(GPU_TOKENS // prompt_tokens, int(free * MEMORY_SHARE) // needed)


def token_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Memory of one token in inference: its keys and values in all layers, and the widest layer's activations."""
    config: Any = model.config.get_text_config(decoder=True)
    size = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_dim
    working = 12 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    return size * cached, size * working
