"""The equivalence check says yes to what is exact, and no, with the reason, to what is not."""

from __future__ import annotations

import pytest
import torch

from align.prefix import rows
from align.prefix.equivalence import check_equivalence, tolerance_for
from align.prefix.layout import Layout, Segment
from tests.prefix.prefix_models import SUPPORTED, gemma3_sliding, make, mamba


def layout_for(inputs: dict[str, torch.Tensor]) -> Layout:
    tree = [Segment([7, 8, 9]), Segment([10]), Segment([11, 12], parent=0)]
    return Layout.build(inputs["attention_mask"], [tree for _ in inputs["input_ids"]], pad_token_id=0)


@pytest.mark.parametrize("family", list(SUPPORTED))
def test_supported_families_are_equivalent(family: str):
    model, inputs = make(SUPPORTED[family])
    found = check_equivalence(model, inputs, layout_for(inputs))
    assert found.exact, found.reason
    assert found.max_error <= 1e-5
    assert found.tolerance == 1e-4


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_coarser_products_of_tf32_are_allowed_for():
    model, _ = make(next(iter(SUPPORTED.values())))
    model.to("cuda")
    before = torch.backends.fp32_precision
    assert tolerance_for(model).largest == 1e-4
    try:
        torch.backends.fp32_precision = "tf32"
        assert tolerance_for(model).largest > 1e-3
    finally:
        torch.backends.fp32_precision = before
