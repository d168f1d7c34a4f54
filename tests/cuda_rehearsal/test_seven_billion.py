"""Steps of Valley-Eagle-7B with few layers in each stack, on a CUDA device that only seems to be there.

A step is a sum over layers, so what one layer more adds, the others will add too: that the whole depth, run once, has
these figures stands in docs/scaling.md.
"""

import pytest
import torch

from align.dpo.step_memory import How, StepBatch, training_memory
from align.models.shapes import model_shape
from scripts.valley_size import build_valley, prompt_of_one_image, work_of

PHOTO = {"width": 800, "height": 600, "words": 57}
SIZE = "valley-eagle-7b"
# With every layer recomputed or none, each at two depths. The second step is the first that has states of the optimiser.
# With none recomputed the peak is where it is in the whole model, at the head, from five layers on.
WAYS = {True: {"steps": 1}, False: {"steps": 2, "checkpointing": False}}
DEPTHS = {True: (2, 3), False: (6, 7)}
SHARDED = (8, 256)


@pytest.fixture(scope="module")
def steps(rehearse):
    keys = [(checkpointing, layers) for checkpointing in WAYS for layers in DEPTHS[checkpointing]]
    found = rehearse([("train", {"family": SIZE, "layers": layers, **WAYS[way], **PHOTO}) for way, layers in keys])
    assert [step["error"] for step in found if "error" in step] == []
    return dict(zip(keys, found, strict=True))


@pytest.fixture(scope="module")
def models():
    """By number of layers, None being all of them."""
    depths = (*DEPTHS[True], *DEPTHS[False], None)
    return {layers: build_valley(SIZE, "meta", torch.float32, layers)[0] for layers in depths}


@pytest.fixture(scope="module")
def inputs():
    return prompt_of_one_image(build_valley(SIZE, "meta", torch.float32, 1)[1])


@pytest.fixture(scope="module")
def batch(steps, inputs):
    """A pair as the memory model counts it."""
    first = next(iter(steps.values()))
    responses = first["response_tokens"]
    pixels = sum(value.numel() for value in inputs.values() if value.is_floating_point())
    prompt = int(inputs["attention_mask"].sum())
    assert prompt + responses == first["row_tokens"]
    return StepBatch(1, prompt, responses // 2, responses - responses // 2, pixels=pixels)


def flops(step) -> int:
    return sum(step["flops"].values())


def at_whole_depth(missed: dict[int, float], models) -> float:
    """What the plan misses by in a step of the whole model, from what it misses by at two depths."""
    (few, at_few), (more, at_more) = missed.items()
    return at_few + (at_more - at_few) / (more - few) * (models[None].config.num_hidden_layers - few)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", WAYS)
def test_the_planned_peak_is_within_three_percent(steps, models, batch, checkpointing):
    how = How(compute_bytes=2, checkpointing=checkpointing, accumulates=False)
    planned = {layers: training_memory(model_shape(model), batch, how).total for layers, model in models.items()}
    missed = {layers: steps[checkpointing, layers]["peak"] - planned[layers] for layers in DEPTHS[checkpointing]}
    assert abs(at_whole_depth(missed, models)) < 0.03 * planned[None]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", SHARDED)
def test_the_planned_peak_of_fsdp2_is_within_three_percent_on_few_ranks_and_many(
    rehearse, models, batch, num_processes
):
    fewest = DEPTHS[True][0]
    ranks = {"strategy": "fsdp2", "num_processes": num_processes}
    (found,) = rehearse([("train", {"family": SIZE, "layers": fewest, "steps": 2, **ranks, **PHOTO})])
    assert "error" not in found, found["error"]
    how = How(compute_bytes=2, checkpointing=True, accumulates=False, **ranks)
    planned = training_memory(model_shape(models[fewest]), batch, how).total
    assert planned == pytest.approx(found["peak"], rel=0.03)


@pytest.mark.slow
def test_operations_per_pair_are_those_of_the_plan(steps, models, batch, inputs):
    planned = {layers: work_of(model, inputs, batch.response_tokens / 2).flops for layers, model in models.items()}
    missed = {layers: flops(steps[False, layers]) - planned[layers] for layers in DEPTHS[False]}
    assert abs(at_whole_depth(missed, models)) < 0.02 * planned[None]
    assert planned[None] + at_whole_depth(missed, models) < 110e12


@pytest.mark.slow
def test_recomputing_costs_a_forward_pass_of_the_language_model_but_for_the_last_product_of_a_layer(
    steps, models, batch
):
    text = model_shape(models[None]).text
    (recomputed, one_more), (kept, another) = ([flops(steps[way, n]) for n in DEPTHS[way]] for way in (True, False))
    # torch stops to recompute once every saved tensor is there: before the down projection, whose result nobody keeps.
    weights = text.active_weights - text.inner * text.hidden
    language = 2 * weights * (batch.prompt_tokens + batch.response_tokens)
    seen = batch.prompt_tokens**2 / 2 + batch.response_tokens * (batch.prompt_tokens + batch.response_tokens)
    per_layer = (one_more - recomputed) - (another - kept)
    assert per_layer == pytest.approx(language + 4 * text.query * seen, rel=0.02)


@pytest.mark.slow
def test_frozen_towers_and_attention_are_as_in_small(steps):
    for step in steps.values():
        assert step["frozen_with_gradients"] == []
        assert {call[0] for call in step["attention"]} <= {"flash", "efficient"}
