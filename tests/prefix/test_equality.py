"""Shared prefix = separate full sequences: log-probabilities, gradients, metrics, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.prefix.attention import use_shared_prefix
from align.prefix.layout import Layout, Segment
from align.prefix.log_probs import forward_segments, unshared_segments
from align.prefix.token_stats import OUTPUTS
from tests.prefix.prefix_models import SUPPORTED, make

FAMILIES = list(SUPPORTED)


def tokens(count: int) -> list[int]:
    return torch.randint(3, 100, (count,)).tolist()


def pair_layout(inputs: dict[str, torch.Tensor]) -> Layout:
    """Chosen and rejected of unequal length behind every prompt, other lengths in every row."""
    rows = [[Segment(tokens(4 + b)), Segment(tokens(6 - b))] for b in range(len(inputs["input_ids"]))]
    return Layout.build(inputs["attention_mask"], rows, pad_token_id=0)


def tree_layout(inputs: dict[str, torch.Tensor]) -> Layout:
    """Three first responses, the other two below each, and an option below one of those; fewer in the last row."""
    rows = []
    for b in range(len(inputs["input_ids"])):
        row = [Segment(tokens(3 + b + i)) for i in range(3)]
        row += [Segment(tokens(2 + j), parent=i) for i in range(3) for j in range(2)]
        row += [Segment(tokens(1), parent=4)]
        rows.append(row)
    rows[-1] = rows[-1][:4]
    return Layout.build(inputs["attention_mask"], rows, pad_token_id=0)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    for name, gradient in theirs.items():
        # The bias of a key projection without rotary positions has no influence: its gradient is rounding alone.
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error <= 1e-5, f"{name}: relative error {error:.2e} of norm {gradient.norm():.2e}"


def loss_of(log_probs: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A different weight for every token, so that no two tokens can be mixed up unnoticed."""
    weight = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
    return (weight * log_probs)[layout.is_token].sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout_of", [pair_layout, tree_layout])
def test_log_probs_equal_those_of_separate_sequences(family: str, layout_of: Any):
    model, inputs = make(SUPPORTED[family])
    layout = layout_of(inputs)
    with torch.no_grad():
        unshared = unshared_segments(model, inputs, layout, OUTPUTS)
        use_shared_prefix(model)
        shared = forward_segments(model, inputs, layout, OUTPUTS)
    assert (unshared.log_probs[layout.is_token] < -0.1).any(), "the model is not trivially certain"
    assert (unshared.log_probs[~layout.is_token] == 0).all()
    for name in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert (getattr(shared, name) - getattr(unshared, name)).abs().max() <= 1e-5, name
    assert torch.equal(shared.is_top1, unshared.is_top1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout_of", [pair_layout, tree_layout])
def test_every_gradient_equals_that_of_separate_sequences(family: str, layout_of: Any):
    model, inputs = make(SUPPORTED[family])
    layout = layout_of(inputs)
    theirs = gradients(model, loss_of(unshared_segments(model, inputs, layout).log_probs, layout))
    use_shared_prefix(model)
    ours = gradients(model, loss_of(forward_segments(model, inputs, layout).log_probs, layout))
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing_though_it_recomputes_outside_of_the_context(reentrant: bool):
    model, inputs = make(SUPPORTED["llava_onevision"])
    layout = pair_layout(inputs)
    use_shared_prefix(model)
    theirs = gradients(model, loss_of(forward_segments(model, inputs, layout).log_probs, layout))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    ours = gradients(model, loss_of(forward_segments(model, inputs, layout).log_probs, layout))
    assert_gradients_equal(ours, theirs)


def test_bfloat16_agrees_within_its_precision():
    model, inputs = make(SUPPORTED["qwen2"])
    layout = pair_layout(inputs)
    model.bfloat16()
    with torch.no_grad():
        unshared = unshared_segments(model, inputs, layout).log_probs
        use_shared_prefix(model)
        shared = forward_segments(model, inputs, layout).log_probs
    assert shared.dtype == torch.float32
    assert (shared - unshared).abs().mean() < 0.02


def test_adapters_inside_the_layers_are_part_of_both_paths():
    from peft import LoraConfig, get_peft_model

    model, inputs = make(SUPPORTED["llava_onevision"])
    layout = pair_layout(inputs)
    with torch.no_grad():
        without = unshared_segments(model, inputs, layout).log_probs
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.eval()
    with torch.no_grad():
        unshared = unshared_segments(adapted, inputs, layout).log_probs
        use_shared_prefix(adapted)
        shared = forward_segments(adapted, inputs, layout).log_probs
    assert (shared - unshared).abs().max() <= 1e-5
    assert (unshared - without).abs().max() > 1e-2
