"""Attention heads that vLLM's CPU kernels have no width for, padded with zeros so that nothing changes.

A head of d channels becomes one of P. Rotary embeddings turn channel i together with i + d/2, so each half is put at
the front of its padded half; a base of `theta ** (P / d)` gives the same frequencies. Attention then divides by sqrt(P)
instead of sqrt(d), which queries scaled by sqrt(P / d) make up for. vLLM's Qwen2 derives the width of a head from the
others; its Llama can be configured, and with a bias on queries, keys and values alone it computes the same.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform


@dataclass(frozen=True)
class NarrowHeads:
    """The text model that vLLM opens. `width` and `padded` are channels per head, equal where nothing is padded."""

    config: Any
    architecture: str
    width: int
    padded: int

    @classmethod
    def of(cls, config: Any, architecture: str) -> NarrowHeads:
        """Raises ValueError for a text model whose heads would have to be padded and cannot be."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        padded = _width_for(width)
        if padded == width:
            return cls(config, architecture, width, width)
        rope = dict(config.rope_parameters)
        if architecture not in ("Qwen2ForCausalLM", "LlamaForCausalLM") or rope.get("rope_type") != "default":
            raise ValueError(f"expected heads of {padded} channels for {architecture}, found {width}")
        wide = copy.deepcopy(config)
        wide.head_dim = padded
        wide.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] ** (padded / width)}
        wide.qkv_bias = architecture == "Qwen2ForCausalLM" or getattr(config, "attention_bias", False)
        return cls(wide, "LlamaForCausalLM", width, padded)

    def pad(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor of the text model as the padded one has it."""
        found = re.search(r"\.self_attn\.([qkvo])_proj\.(weight|bias)$", name)
        if found and self.padded != self.width:
            kind = found[1]
            if kind == "o":
                tensor = self._spread(tensor.T, halves=False).T
            else:
                tensor = self._spread(tensor, halves=kind != "v")
            if kind == "q":
                tensor = tensor * math.sqrt(self.padded / self.width)
        yield name, tensor

    def _spread(self, rows: torch.Tensor, *, halves: bool) -> torch.Tensor:
        """`(heads * width, ...)` to `(heads * padded, ...)`."""
        parts = 2 if halves else 1
        split = rows.reshape(-1, parts, self.width // parts, *rows.shape[1:])
        spread = split.new_zeros(split.shape[0], parts, self.padded // parts, *rows.shape[1:])
        spread[:, :, : self.width // parts] = split
        return spread.flatten(0, 2)


def _width_for(width: int) -> int:
    """The narrowest width of a head, not below `width`, that the current platform's attention takes."""
    if not current_platform.is_cpu():
        return width
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return min((size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= width), default=width)
