"""The last layer computes only what is read of it, and everything when there is no layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from align.prefix.attention import stop_shared_prefix, use_shared_prefix
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import forward_segments, unshared_segments
from align.prefix.rows import decoder_layers
from tests.prefix.prefix_models import SUPPORTED, TEXT, make, text_prompts

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")


def layout_of(inputs: dict[str, torch.Tensor]) -> Layout:
    rows = [[Segment([7, 8, 9 + b]), Segment([10, 11])] for b in range(len(inputs["input_ids"]))]
    return Layout.build(inputs["attention_mask"], rows, pad_token_id=0)


def experts() -> tuple[Any, dict[str, torch.Tensor]]:
    config = Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    return Qwen3MoeForCausalLM(config), text_prompts([9, 5])


def places_computed(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> dict[tuple[int, str], int]:
    """By layer and part: how many places of a row it was asked for in a forward pass."""
    found: dict[tuple[int, str], int] = {}
    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        for name in PARTS:

            def note(_: Any, args: Any, key: tuple[int, str] = (index, name)) -> None:
                found[key] = args[0].shape[1]

            handles.append(layer.get_submodule(name).register_forward_pre_hook(note))
    with torch.no_grad():
        forward_segments(model, inputs, layout)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", list(SUPPORTED))
def test_the_last_layer_computes_where_it_is_read_and_keys_and_values_everywhere(family: str):
    model, inputs = make(SUPPORTED[family])
    layout = layout_of(inputs)
    use_shared_prefix(model)
    use_shared_prefix(model)
    length = layout.input_ids.shape[1]
    whole, last = inputs["input_ids"].shape[1] + length, len(decoder_layers(model)) - 1
    for (layer, part), places in places_computed(model, inputs, layout).items():
        assert places == (1 + length if layer == last and part != "self_attn.k_proj" else whole), (layer, part)


def test_it_is_as_before_once_the_shared_prefix_is_given_up():
    model, _ = make(SUPPORTED["qwen2"])
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    use_shared_prefix(model)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] != before
    stop_shared_prefix(model)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_a_copy_has_places_of_its_own():
    model, inputs = make(SUPPORTED["qwen2"])
    use_shared_prefix(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = forward_segments(model, inputs, layout_of(inputs)).log_probs
        short = {name: value[:1, :3] for name, value in inputs.items()}
        forward_segments(model, short, layout_of(short))
        assert torch.equal(forward_segments(twin, inputs, layout_of(inputs)).log_probs, expected)
    stop_shared_prefix(twin)
    assert decoder_layers(model)[-1]._forward_pre_hooks


def test_layers_of_experts_are_left_whole_and_equal():
    model, inputs = make(experts)
    layout = layout_of(inputs)
    with torch.no_grad():
        expected = unshared_segments(model, inputs, layout).log_probs
        use_shared_prefix(model)
        assert (forward_segments(model, inputs, layout).log_probs - expected).abs().max() <= 1e-5


def test_a_part_that_is_given_no_rows_computes_all_that_it_is_given():
    model, inputs = make(SUPPORTED["qwen2"])
    inputs = {name: value[:1] for name, value in inputs.items()}
    layout, last = layout_of(inputs), decoder_layers(model)[-1]
    last.post_attention_layernorm.register_forward_hook(lambda _, __, output: output.squeeze(0))
    with torch.no_grad():
        expected = unshared_segments(model, inputs, layout).log_probs
        use_shared_prefix(model)
        assert (forward_segments(model, inputs, layout).log_probs - expected).abs().max() <= 1e-5
    given = places_computed(model, inputs, layout)
    assert given[len(decoder_layers(model)) - 1, "self_attn.o_proj"] == 1 + layout.input_ids.shape[1]
