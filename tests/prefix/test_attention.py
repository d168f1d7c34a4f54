"""What the attention does without a layout, with a cache, and where it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from align.prefix.attention import (
    NAME,
    AttentionPlan,
    PrefixUnsupported,
    active_layout,
    stop_shared_prefix,
    use_shared_prefix,
)
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import forward_segments, segment_hidden_states
from align.prefix.rows import row_inputs
from tests.prefix.prefix_models import SUPPORTED, gemma3_sliding, make, mamba, text_prompts


@pytest.mark.parametrize("family", list(SUPPORTED))
def test_without_a_layout_the_model_is_what_it_was(family: str):
    model, inputs = make(SUPPORTED[family])
    with torch.no_grad():
        before = model(**inputs).logits
        use_shared_prefix(model)
        during = model(**inputs).logits
        stop_shared_prefix(model)
        after = model(**inputs).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


def test_generate_works_while_no_layout_is_active():
    model, _ = make(SUPPORTED["qwen2"])
    prompt = torch.tensor([[5, 6, 7]])
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    use_shared_prefix(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), before)


def test_only_the_language_models_attention_is_set():
    model, _ = make(SUPPORTED["llava_onevision"])
    use_shared_prefix(model)
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_segments_over_cached_prompts_equal_one_forward():
    model, inputs = make(SUPPORTED["qwen2"])
    rows = [[Segment([7, 8, 9]), Segment([10, 11, 12])], [Segment([20, 21, 22]), Segment([23])], [Segment([30, 31])]]
    layout = Layout.build(inputs["attention_mask"], rows, pad_token_id=0)
    use_shared_prefix(model)
    prompt_width, width = inputs["input_ids"].shape[1], layout.input_ids.shape[1]
    with torch.no_grad():
        with active_layout(layout):
            whole = model.model(**row_inputs(model, inputs, layout)).last_hidden_state[:, prompt_width:]
        cache = DynamicCache(config=model.config)
        with active_layout(AttentionPlan(prompt_width, None)):
            model.model(**inputs, past_key_values=cache)
        mask = layout.mask()
        positions = layout.prompt_lengths[:, None] + layout.path_position
        parts = []
        for start, stop in ((0, 1), (1, 4), (4, width)):
            with active_layout(AttentionPlan(0, mask[:, :, start:stop, : prompt_width + stop])):
                out = model.model(
                    input_ids=layout.input_ids[:, start:stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                )
            parts.append(out.last_hidden_state)
    error = (torch.cat(parts, dim=1) - whole)[layout.is_token].abs().max()
    assert error <= 1e-5


def layout_for(inputs: dict[str, torch.Tensor]) -> Layout:
    rows = [[Segment([7, 8]), Segment([9])] for _ in inputs["input_ids"]]
    return Layout.build(inputs["attention_mask"], rows, pad_token_id=0)


def test_sliding_windows_are_refused():
    model, inputs = make(gemma3_sliding)
    use_shared_prefix(model)
    with pytest.raises(PrefixUnsupported, match="sliding"):
        forward_segments(model, inputs, layout_for(inputs))


def test_a_window_in_every_layer_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    model, inputs = make(lambda: (MistralForCausalLM(config), text_prompts()))
    use_shared_prefix(model)
    with pytest.raises(PrefixUnsupported, match="plain causal mask"):
        forward_segments(model, inputs, layout_for(inputs))


def test_layers_that_are_not_attention_are_noticed():
    model, inputs = make(mamba)
    use_shared_prefix(model)
    with pytest.raises(PrefixUnsupported, match="0 of the model's 2 layers"):
        segment_hidden_states(model, inputs, layout_for(inputs))


def test_image_blocks_that_see_both_ways_are_refused():
    from transformers.masking_utils import create_causal_mask

    model, inputs = make(SUPPORTED["qwen2"])
    use_shared_prefix(model)
    layout = layout_for(inputs)
    rows = row_inputs(model, inputs, layout)
    with active_layout(layout), pytest.raises(PrefixUnsupported, match="plain causal mask"):
        create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(*rows["input_ids"].shape, 32),
            attention_mask=rows["attention_mask"],
            past_key_values=None,
            or_mask_function=lambda b, h, q, k: k < 3,
        )


def test_a_layout_of_another_shape_is_refused():
    model, inputs = make(SUPPORTED["qwen2"])
    use_shared_prefix(model)
    with active_layout(layout_for(inputs)), pytest.raises(PrefixUnsupported, match="the model asks for"):
        model(**inputs)


def test_other_attention_than_sdpa_is_left_alone():
    config = Qwen2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = Qwen2ForCausalLM(config)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PrefixUnsupported, match="flex_attention"):
        use_shared_prefix(model)
    stop_shared_prefix(model)
    assert model.config._attn_implementation == "flex_attention"


def test_the_set_attention_is_not_written_into_a_checkpoints_config(tmp_path):
    model, _ = make(SUPPORTED["llava_onevision"])
    use_shared_prefix(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_one_mask_and_groups_are_the_same_attention():
    from align.prefix.plans import GroupedPlan

    torch.manual_seed(0)
    rows = [
        [Segment([1] * 3), Segment([2] * 4), Segment([3] * 2, 0), Segment([4], 1), Segment([5] * 2, 0)],
        [Segment([1] * 5)],
        [Segment([]), Segment([2] * 2, 0), Segment([3] * 3)],
    ]
    layout = Layout.build(torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]), rows, pad_token_id=0)
    masked, grouped = AttentionPlan(3, layout.mask()), GroupedPlan(layout)
    assert (grouped.num_queries, grouped.num_keys) == (masked.num_queries, masked.num_keys)
    length = layout.input_ids.shape[1]
    query, key = torch.randn(3, 4, length, 8), torch.randn(3, 2, 3 + length, 8)
    value = torch.randn_like(key)
    ours = grouped.attend(query, key, value, scale=None, dropout=0.0).transpose(1, 2)
    theirs = masked.attend(query, key, value, scale=None, dropout=0.0).transpose(1, 2)
    assert (ours - theirs)[layout.is_token].abs().max() <= 1e-6


def test_many_segments_are_computed_in_groups_and_few_under_one_mask():
    from align.prefix.plans import GroupedPlan, plan_of

    prompt = torch.ones(1, 100)
    few = Layout.build(prompt, [[Segment([1] * 12)] * 2], pad_token_id=0)
    many = Layout.build(prompt, [[Segment([1] * 12)] * 20], pad_token_id=0)
    assert not isinstance(plan_of(few), GroupedPlan)
    assert isinstance(plan_of(many), GroupedPlan)
