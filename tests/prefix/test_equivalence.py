"""The equivalence check says yes to what is exact, and no, with the reason, to what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from align.prefix import rows
from align.prefix.attention import use_shared_prefix
from align.prefix.equivalence import check_equivalence
from align.prefix.full_precision import in_float32
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import forward_segments
from align.prefix.rows import backbone_of
from tests.prefix.prefix_models import SUPPORTED, gemma3_sliding, make, mamba


def layout_for(inputs: dict[str, torch.Tensor]) -> Layout:
    tree = [Segment([7, 8, 9]), Segment([10]), Segment([11, 12], parent=0)]
    return Layout.build(inputs["attention_mask"], [tree for _ in inputs["input_ids"]], pad_token_id=0)


@pytest.mark.parametrize("family", list(SUPPORTED))
def test_supported_families_are_equivalent(family: str):
    model, inputs = make(SUPPORTED[family])
    found = check_equivalence(model, inputs, layout_for(inputs))
    assert found.exact, found.reason
    assert found.difference.largest <= 1e-5
    assert set(found.wrong) == {"positions shifted by one", "siblings that see one another"}


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name not in ("qwen2", "llama")])
def test_images_are_encoded_once_for_all_that_is_compared_and_anew_afterwards(family: str):
    model, inputs = make(SUPPORTED[family])
    backbone, calls = backbone_of(model), []
    towers = [module for name, module in backbone.named_modules() if name.endswith(("vision_tower", "visual"))]
    for tower in towers:
        tower.register_forward_hook(lambda tower, *_: calls.append(tower))
    for _ in range(2):
        calls.clear()
        assert check_equivalence(model, inputs, layout_for(inputs)).exact
        assert 0 < len(calls) == len(set(calls))


@pytest.mark.parametrize(("build", "reason"), [(gemma3_sliding, "sliding"), (mamba, "layers")])
def test_other_architectures_are_not_and_the_check_says_why(build, reason: str):
    model, inputs = make(build)
    found = check_equivalence(model, inputs, layout_for(inputs))
    assert not found.exact
    assert reason in found.reason


def test_wrong_positions_are_noticed(monkeypatch: pytest.MonkeyPatch):
    model, inputs = make(SUPPORTED["qwen2"])
    right = rows.prompt_positions_of

    def wrong(*args):
        positions, start = right(*args)
        return positions, start + 1

    monkeypatch.setattr(rows, "prompt_positions_of", wrong)
    found = check_equivalence(model, inputs, layout_for(inputs))
    assert not found.exact
    assert "differ" in found.reason


def test_not_a_number_is_not_agreement():
    model, inputs = make(SUPPORTED["qwen2"])
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    assert not check_equivalence(model, inputs, layout_for(inputs)).exact


def test_whatever_the_architecture_raises_becomes_the_reason():
    model, inputs = make(SUPPORTED["llava_onevision"])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    found = check_equivalence(model, inputs, layout_for(inputs))
    assert not found.exact
    assert found.reason.split(":")[0].endswith("Error")


def test_dropout_is_off_during_the_check_and_training_mode_comes_back():
    model, inputs = make(SUPPORTED["qwen2"])
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert check_equivalence(model, inputs, layout_for(inputs)).exact
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", list(SUPPORTED))
def test_half_precision_is_allowed_its_own_noise(family: str, dtype: torch.dtype):
    model, inputs = make(SUPPORTED[family])
    model, inputs = model.to(dtype), {name: _to(value, dtype) for name, value in inputs.items()}
    found = check_equivalence(model, inputs, layout_for(inputs))
    assert found.exact, found.reason
    assert {p.dtype for p in model.parameters()} == {dtype}


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def long_prompt(dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor], Layout]:
    """A prompt so long that one position more or less changes less than bfloat16 rounds away."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=500, num_key_value_heads=2, **sizes)).to(dtype)
    ids = torch.randint(3, 490, (1, 400))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = [[Segment(torch.randint(3, 490, (24,)).tolist()) for _ in range(2)]]
    return model, inputs, Layout.build(inputs["attention_mask"], rows, pad_token_id=0)


def test_what_half_precision_hides_is_told_apart_in_float32():
    found = check_equivalence(*long_prompt(torch.bfloat16))
    assert found.exact
    assert "in float32, where right and wrong can be distinguished" in found.reason
    assert found.difference.largest < 1e-5 < found.wrong["positions shifted by one"].largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_shifted_by_one_position_never_pass(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    model, inputs, layout = long_prompt(dtype)
    right = rows.prompt_positions_of

    def wrong(*args):
        positions, start = right(*args)
        return positions, start + 1

    monkeypatch.setattr(rows, "prompt_positions_of", wrong)
    found = check_equivalence(model, inputs, layout)
    assert not found.exact, found.reason


def test_a_model_on_which_wrong_rows_make_no_difference_is_not_trusted():
    model, inputs, layout = long_prompt(torch.float32)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    found = check_equivalence(model, inputs, layout)
    assert not found.exact
    assert found.difference.largest == 0
    assert "cannot tell" in found.reason


def test_a_model_computes_in_float32_on_its_own_half_precision_weights():
    model, inputs, layout = long_prompt(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    use_shared_prefix(model)
    with torch.no_grad(), in_float32(model):
        found = forward_segments(model, inputs, layout).log_probs
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        expected = forward_segments(model.float(), inputs, layout).log_probs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
