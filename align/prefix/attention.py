"""Attention in which the segments of a row see the prompt and their own path, as two plain SDPA calls.

The prompt's tokens are causal among themselves and need no mask: right padding stands behind every real token. The
segments' tokens see `[prompt keys | segment keys]` under a mask of `(segments, prompt + segments)`; where there are
many segments, those below each child of the prompt see `[prompt keys | their own keys]` as a batch entry of their own.
No mask of the whole row squared is ever made. `register` tells transformers the name; `use_shared_prefix` sets it on
the language model; outside `active_layout` it is sdpa, to the bit.

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

from align.prefix.last_layer import compute_everywhere, compute_where_read
from align.prefix.layout import Layout
from align.prefix.plans import AttentionPlan, plan_of

NAME = "shared_prefix"


class PrefixUnsupported(Exception):
    """The model wants an attention that a shared prefix cannot give; use the unshared path."""


_active: ContextVar[AttentionPlan | None] = ContextVar("active_plan", default=None)


@contextmanager
def active_layout(layout: Layout | AttentionPlan) -> Iterator[AttentionPlan]:
    """Within the context, every forward of a model set by `use_shared_prefix` is laid out like this."""
    plan = plan_of(layout) if isinstance(layout, Layout) else layout
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
    compute_where_read(model)


def stop_shared_prefix(model: PreTrainedModel) -> None:
    """Give the language model sdpa back, after the equivalence check has failed.
    Other attentions are left as they are."""
    for config in _decoder_configs(model):
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = "sdpa"
    compute_everywhere(model)


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
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu" and _computes_in_float32(query):
        # A GPU has one kernel for float32 that holds no queries times keys, and it takes no grouped ones.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _computes_in_float32(query: Tensor) -> bool:
    kind = query.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype) == torch.float32
