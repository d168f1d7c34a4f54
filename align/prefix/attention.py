"""Attention in which the segments of a row see the prompt and their own path, as two plain SDPA calls.

The prompt's tokens are causal among themselves and need no mask: right padding stands behind every real token. The
segments' tokens see `[prompt keys | segment keys]` under a mask of `(segments, prompt + segments)`. No mask of the
whole row squared is ever made. `register` tells transformers the name; `use_shared_prefix` sets it on the language
model; outside `active_layout` it is sdpa, to the bit.

Inside `active_layout`, the mask function gives the layers an `AttentionPlan` where they expect a mask. It travels as
the layers' argument, so that gradient checkpointing, which runs a layer again in backward and outside of the context,
finds it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from align.prefix.layout import Layout

NAME = "shared_prefix"


class PrefixUnsupported(Exception):
    """The model wants an attention that a shared prefix cannot give; use the plain path."""


class AttentionPlan:
    """What the layers of one forward receive in place of a mask.

    `prompt_width` P: the first P queries are prompt tokens, causal among themselves; 0 where the prompt's keys
    come from a cache. `mask` `(B, 1, Q, K)` bool: what the remaining Q queries see of all K keys; None without such
    queries. `num_calls` counts the layers that asked, so that a model with other than attention layers is noticed.
    """

    def __init__(self, prompt_width: int, mask: Tensor | None) -> None:
        self.prompt_width = prompt_width
        self.mask = mask
        self.num_calls = 0
        self._biases: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @classmethod
    def of_layout(cls, layout: Layout) -> AttentionPlan:
        """The plan for whole rows `[prompt | segments]` in one forward."""
        has_segments = layout.input_ids.shape[1] > 0
        return cls(layout.prompt_mask.shape[1], layout.mask() if has_segments else None)

    @property
    def num_queries(self) -> int:
        return self.prompt_width + (0 if self.mask is None else self.mask.shape[2])

    @property
    def num_keys(self) -> int:
        return self.prompt_width if self.mask is None else self.mask.shape[3]

    def bias(self, like: Tensor) -> Tensor:
        """The mask as 0 and -inf, made once a dtype: SDPA would otherwise convert the bool mask in every layer."""
        assert self.mask is not None
        key = (like.dtype, like.device)
        if key not in self._biases:
            mask = self.mask.to(like.device)
            self._biases[key] = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~mask, float("-inf")
            )
        return self._biases[key]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """`(B, heads, Q, D)` for the queries behind the prompt: the one place where another kernel would be chosen."""
        return _masked_attention(query, key, value, self.bias(query), scale=scale, dropout=dropout)


_active: ContextVar[AttentionPlan | None] = ContextVar("active_plan", default=None)


@contextmanager
def active_layout(layout: Layout | AttentionPlan) -> Iterator[AttentionPlan]:
    """Within the context, every forward of a model set by `use_shared_prefix` is laid out like this."""
    plan = AttentionPlan.of_layout(layout) if isinstance(layout, Layout) else layout
    token = _active.set(plan)
    try:
        yield plan
    finally:
        _active.reset(token)


def register() -> None:
    """Make the attention and its mask function known to transformers; harmless when done twice."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, shared_prefix_mask)


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Set the language model's attention to `shared_prefix`; the other towers keep theirs.

    Raises PrefixUnsupported when there is no decoder whose attention can be set, or the model does not use sdpa
    otherwise: falling back to sdpa outside of a layout would then change its results.
    """
    register()
    for config in _decoder_configs(model):
        if config._attn_implementation not in ("sdpa", "eager", NAME):
            raise PrefixUnsupported(f"the language model uses {config._attn_implementation} attention")
        # Set on this config alone; the property's setter would also reach the configs of other towers.
        config._attn_implementation_internal = NAME


def stop_shared_prefix(model: PreTrainedModel) -> None:
    """Give the language model sdpa back, after a proof has failed."""
    for config in _decoder_configs(model):
        config._attn_implementation_internal = "sdpa"


def _decoder_configs(model: PreTrainedModel) -> list[Any]:
    """The configs that the language model's layers read; usually one object under two names."""
    decoder = model.get_decoder()
    configs = [decoder.config, model.config.get_text_config(decoder=True)]
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if config is not None and type(config) is type(decoder.config):
            configs.append(config)
    return list({id(config): config for config in configs}.values())


def shared_prefix_mask(*args: Any, **kwargs: Any) -> Any:
    """The active plan, once it is certain that the model wants nothing but a plain causal mask; else sdpa's mask."""
    plan = _active.get()
    if plan is None:
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function or kwargs.get("local_size"):
        raise PrefixUnsupported("the model does not use a plain causal mask (sliding window, image blocks or packing)")
    config = kwargs.get("config")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types <= {"full_attention"}:
        raise PrefixUnsupported(f"the model has layers of type {', '.join(sorted(layer_types - {'full_attention'}))}")
    if kwargs["q_length"] != plan.num_queries or kwargs["kv_length"] != plan.num_keys:
        raise PrefixUnsupported(
            f"the layout is for {plan.num_queries} queries and {plan.num_keys} keys, the model asks for "
            f"{kwargs['q_length']} and {kwargs['kv_length']}"
        )
    return plan


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | AttentionPlan | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `(B, heads, T, D)` query, keys and values in, `(B, T, heads, D)` out."""
    if not isinstance(attention_mask, AttentionPlan):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for extra in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if kwargs.get(extra) is not None:
            raise PrefixUnsupported(f"the model's attention uses {extra}")
    plan = attention_mask
    plan.num_calls += 1
    width = plan.prompt_width
    parts = []
    if width:
        parts.append(
            _causal_attention(
                query[:, :, :width], key[:, :, :width], value[:, :, :width], scale=scaling, dropout=dropout
            )
        )
    if plan.mask is not None:
        parts.append(plan.attend(query[:, :, width:], key, value, scale=scaling, dropout=dropout))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
    return scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, scale: float | None, dropout: float
) -> Tensor:
    """SDPA under an additive mask `(B, 1, Q, K)`, grouped queries on whichever way is fast on the device.

    Measured on CPU (4 query heads on 2 key heads, 1000 + 2 x 120 tokens): grouped 9.1 ms forward and backward,
    repeated keys 10.0 ms. With 8 heads on 1, backward of the grouped way is slower (29 against 18 ms), without
    gradients it is faster (5.1 against 5.3 ms). On CUDA the fused kernels that take a mask have no grouped queries.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (query.is_cuda or (groups > 4 and query.requires_grad)):
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    return scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
    )
