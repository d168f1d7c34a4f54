"""A step of Valley-Eagle-7B on a CUDA device that only seems to be there, against what the plan says of it."""

import pytest
import torch

from align.dpo.step_memory import How, StepBatch, training_memory
from align.models.shapes import model_shape
from scripts.valley_size import build_valley, prompt_of_one_image, work_of

PHOTO = {"width": 800, "height": 600, "words": 57}
SIZE = "valley-eagle-7b"


@pytest.fixture(scope="module")
def steps(rehearse):
    scenarios = [
        ("train", {"family": SIZE, "steps": 1, **PHOTO}),
        ("train", {"family": SIZE, "steps": 2, "checkpointing": False, **PHOTO}),
    ]
    recomputed, kept = rehearse(scenarios)
    assert "error" not in recomputed, recomputed["error"]
    assert "error" not in kept, kept["error"]
    return {True: recomputed, False: kept}


@pytest.fixture(scope="module")
def planned(steps):
    """The model's shape, a pair as the memory model counts it, and the operations of a step."""
    model, processor = build_valley(SIZE, "meta", torch.float32)
    inputs = prompt_of_one_image(processor)
    responses = steps[True]["response_tokens"]
    pixels = sum(value.numel() for value in inputs.values() if value.is_floating_point())
    prompt = int(inputs["attention_mask"].sum())
    assert prompt + responses == steps[True]["row_tokens"]
    batch = StepBatch(1, prompt, responses // 2, responses - responses // 2, pixels=pixels)
    return model_shape(model), batch, work_of(model, inputs, responses / 2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_planned_peak_is_within_three_percent(steps, planned, checkpointing):
    shape, batch, _ = planned
    how = How(compute_bytes=2, checkpointing=checkpointing, accumulates=False)
    memory = training_memory(shape, batch, how).total
    assert memory == pytest.approx(steps[checkpointing]["peak"], rel=0.03)


@pytest.mark.slow
def test_operations_per_pair_are_those_of_the_plan(steps, planned):
    assert sum(steps[False]["flops"].values()) == pytest.approx(planned[2].flops, rel=0.02)


@pytest.mark.slow
def test_recomputing_costs_a_forward_pass_of_the_language_model_but_for_the_last_product_of_a_layer(steps, planned):
    shape, batch, _ = planned
    recomputed, kept = (sum(steps[way]["flops"].values()) for way in (True, False))
    # torch stops to recompute once every saved tensor is there: before the down projection, whose result nobody keeps.
    weights = shape.text.num_layers * (shape.text.active_weights - shape.text.inner * shape.text.hidden)
    language = 2 * weights * (batch.prompt_tokens + batch.response_tokens)
    seen = batch.prompt_tokens**2 / 2 + batch.response_tokens * (batch.prompt_tokens + batch.response_tokens)
    attention = 4 * shape.text.num_layers * shape.text.query * seen
    assert recomputed - kept == pytest.approx(language + attention, rel=0.02)
    assert kept < 110e12


@pytest.mark.slow
def test_frozen_towers_and_attention_are_as_in_small(steps):
    for step in steps.values():
        assert step["frozen_with_gradients"] == []
        assert {call[0] for call in step["attention"]} <= {"flash", "efficient"}
