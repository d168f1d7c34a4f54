"""A processor's inputs for the prompts in; the backbone's inputs for rows `[prompt | segments]` out.

Positions of segments continue from the end of their prompt. Models with several position axes (Qwen-VL, GLM-V) give the
prompt's positions themselves, through their own `get_rope_index`; a segment's token is plain text there, with the same
position on all axes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from align.prefix.layout import Layout


def unwrap(model: PreTrainedModel) -> Any:
    """The model inside a PEFT wrapper, whose adapters live in its layers; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of the model that gives hidden states, images and all, without the vocabulary projection."""
    inner = unwrap(model)
    return getattr(inner, inner.base_model_prefix)


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The language model's layers that can be checkpointed, in order."""
    lists = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    return [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]


def row_inputs(
    model: PreTrainedModel, prompt_inputs: Mapping[str, Any], layout: Layout, *, packed: bool = False
) -> dict[str, Any]:
    """Keyword arguments of the backbone for the whole rows.

    Per-token extras (`mm_token_type_ids`, `token_type_ids`) get the value of plain text, 0, over the segments. With
    `packed`, the single segment of every row follows its last real prompt token, the padding stands at the end, and
    positions are left to the model.
    """
    prompt_ids = prompt_inputs["input_ids"]
    inputs = dict(prompt_inputs)
    inputs.pop("position_ids", None)
    per_token = _per_token(inputs)
    extra = layout.input_ids.new_zeros(layout.input_ids.shape)
    tails = {"input_ids": layout.input_ids, "attention_mask": layout.is_token}
    for name in {*per_token, "input_ids", "attention_mask"}:
        head = layout.prompt_mask if name == "attention_mask" else inputs[name]
        tail = tails.get(name, extra)
        dtype = prompt_ids.dtype if name == "attention_mask" else head.dtype
        inputs[name] = torch.cat([head.to(dtype), tail.to(head.device, dtype)], dim=1)
    if packed:
        order = (inputs["attention_mask"] == 0).to(torch.int8).argsort(dim=1, stable=True)
        for name in {*per_token, "input_ids", "attention_mask"}:
            inputs[name] = inputs[name].gather(1, order)
        return inputs
    prompt_positions, start = prompt_positions_of(model, prompt_inputs, layout.prompt_mask)
    segment_positions = start[:, None] + layout.path_position
    if prompt_positions.ndim == 3:
        segment_positions = segment_positions.expand(len(prompt_positions), -1, -1)
    inputs["position_ids"] = torch.cat([prompt_positions, segment_positions], dim=-1)
    return inputs


def padded_left(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """The backbone's inputs with so many masked tokens in front of every row."""
    if not count:
        return inputs
    fronts = {name: inputs[name].new_zeros(len(inputs[name]), count) for name in _per_token(inputs)}
    return inputs | {name: torch.cat([front, inputs[name]], dim=1) for name, front in fronts.items()}


def _per_token(inputs: Mapping[str, Any]) -> list[str]:
    """Which of the inputs have a number for every token."""
    shape = inputs["input_ids"].shape
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and not value.is_floating_point() and value.shape == shape
    ]


def prompt_positions_of(
    model: PreTrainedModel, prompt_inputs: Mapping[str, Any], prompt_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions of the prompts, `(B, P)` or `(axes, B, P)` int64, and `(B,)`: where their segments begin."""
    backbone = backbone_of(model)
    rope_index = getattr(backbone, "get_rope_index", None)
    if rope_index is not None and any(name.endswith("grid_thw") for name in prompt_inputs):
        known = inspect.signature(rope_index).parameters
        arguments = {name: value for name, value in prompt_inputs.items() if name in known}
        arguments["attention_mask"] = prompt_mask.to(prompt_inputs["input_ids"].dtype)
        positions, _ = rope_index(**arguments)
        start = positions.masked_fill(~prompt_mask, 0).amax(dim=(0, 2)) + 1
        return positions, start
    positions = torch.arange(prompt_mask.shape[1], device=prompt_mask.device).expand(prompt_mask.shape)
    return positions, prompt_mask.sum(dim=1)


def placeholder_ids(model: PreTrainedModel) -> set[int]:
    """Token ids that stand for images or videos in the model's inputs."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(model.config, name, None) for name in names)
    return {value for value in found if isinstance(value, int)}
