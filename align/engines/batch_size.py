"""How many items make a batch: what fits into memory, found by itself, and less after running out.

On a GPU the free memory is divided by what a token of a batch needs. On a CPU, where memory is not what limits, a batch
has about as many tokens as keep the cores busy. Running out of memory halves the batch for good.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from align import accelerator
from align.errors import UserError

# What items are: questions to sample responses to, prompts with branches to be judged.
SAMPLES, BRANCHES = "samples", "branches"
# Items of a batch as long as nobody knows how large items are.
FIRST_ITEMS = 2
# More does not make a CPU faster, and needs memory.
CPU_TOKENS = 8192
# Beyond this a GPU gains nothing from wider batches.
GPU_TOKENS = 131_072
# Of the free memory; the rest is for the vision towers, fragmentation and logits.
MEMORY_SHARE = 0.6
# Questions being decoded, over those that are read at once: while some wait for their last responses, others begin.
HELD_SHARE = 2


@dataclass
class BatchSizer:
    """`fixed`: items per batch, None: as memory allows. `num_halvings` counts how often memory ran out."""

    model: PreTrainedModel
    fixed: int | None = None
    num_halvings: int = 0
    _limit: int | None = None
    _sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def saw(self, kind: str, prompt_tokens: int, new_tokens: int = 0) -> None:
        """Remember an item of a kind that reads and then writes so many tokens."""
        before = self._sizes.get(kind, (1, 0))
        self._sizes[kind] = max(before[0], prompt_tokens), max(before[1], new_tokens)

    def knows(self, kind: str) -> bool:
        """Whether an item of this kind has been seen."""
        return kind in self._sizes

    def num_items(self, kind: str) -> int:
        """Items of a kind in a batch, at least 1: such that as many of the largest one that was seen fit."""
        if kind not in self._sizes:
            return self._limited(min(FIRST_ITEMS, self.fixed or FIRST_ITEMS))
        return self._limited(self.fixed or self._by_memory(kind))

    def num_held(self, kind: str) -> int:
        """Items whose keys may be kept at a time, while items are begun in batches."""
        if self.fixed is not None or kind not in self._sizes:
            return self.num_items(kind)
        return self._limited(_held_share(kind) * self._by_memory(kind))

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

    def _limited(self, count: int) -> int:
        return max(1, count if self._limit is None else min(count, self._limit))

    def _by_memory(self, kind: str) -> int:
        prompt_tokens, new_tokens = self._sizes[kind]
        free = accelerator.free_memory(next(self.model.parameters()).device)
        if free is None:
            return max(1, CPU_TOKENS // prompt_tokens)
        cached, working = token_bytes(self.model)
        needed = prompt_tokens * working + _held_share(kind) * (prompt_tokens + new_tokens) * cached
        return max(1, min(GPU_TOKENS // prompt_tokens, int(free * MEMORY_SHARE) // needed))


def _held_share(kind: str) -> int:
    return HELD_SHARE if kind == SAMPLES else 1


def token_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Memory of one token in inference: its keys and values in all layers, and the widest layer's activations."""
    config: Any = model.config.get_text_config(decoder=True)
    size = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_dim
    working = 12 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    return size * cached, size * working
