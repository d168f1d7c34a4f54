"""`align plan`: its memory model against measured peaks, and what it says of a run."""

from dataclasses import replace

import pytest

from align.config import load_config
from align.dpo.texts import pair_lengths
from align.images import ImageStore
from align.memory import GIB, How, ModelShape, Stack, StepBatch, text_tokens, training_memory
from align.plan import Machine, PromptMeter, make_plan, text_flops
from align.plan_text import plan_text
from scripts.check_plan import CASES, SMALL, Case, check
from tests import tiny_models
from tests.dpo.conftest import make_pairs
from tests.stage_runs import make_project

CHECKED = ("small, short", "small, short, checkpointed", "small, everything trained")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHECKED], ids=lambda case: case.name)
def test_the_planned_peak_is_within_fifteen_percent_of_the_measured_one(case):
    planned, measured, _ = check(replace(case, prompt=150))
    assert planned.total == pytest.approx(measured, rel=0.15)


def test_separate_rows_are_planned_with_what_they_repeat():
    planned, measured, _ = check(Case("separate rows", SMALL, prompt=150, shared=False))
    assert planned.total == pytest.approx(measured, rel=0.15)


TEXT = Stack(28, 3584, 3584, 512, 18944, True, True, True, True, layer_weights=233_000_000)
SEVEN_B = ModelShape(
    weights=7_600_000_000,
    trained=7_600_000_000,
    linear=7_000_000_000,
    largest_layer=233_000_000,
    text=TEXT,
    towers=(),
    vocabulary=152_064,
    head_trained=True,
    embeddings_trained=True,
    tied=False,
    parts={},
)
BATCH = StepBatch(1, 1500, 500, 500)
ON_GPU = How(compute_bytes=2, checkpointing=True)


def test_weights_gradients_and_optimiser_of_one_process_are_sixteen_bytes_a_weight():
    memory = training_memory(SEVEN_B, BATCH, ON_GPU)
    assert memory.weights + memory.gradients + memory.optimiser == 16 * SEVEN_B.weights


def test_eight_processes_share_what_their_strategy_spreads():
    spread = {
        s: training_memory(SEVEN_B, BATCH, replace(ON_GPU, strategy=s, num_processes=8))
        for s in ("zero2", "zero3", "fsdp2")
    }
    # DeepSpeed keeps bf16 weights, and an fp32 copy of them with Adam's two moments.
    assert spread["zero2"].weights == 2 * SEVEN_B.weights
    assert spread["zero3"].weights == 2 * SEVEN_B.weights // 8
    assert spread["zero2"].optimiser == spread["zero3"].optimiser == 12 * SEVEN_B.weights // 8
    assert spread["fsdp2"].weights == 4 * SEVEN_B.weights // 8
    assert spread["zero3"].total < 80 * GIB < training_memory(SEVEN_B, BATCH, ON_GPU).total


def test_checkpointing_and_a_shared_prompt_keep_less():
    plain = How(compute_bytes=2)
    assert training_memory(SEVEN_B, BATCH, ON_GPU).total < training_memory(SEVEN_B, BATCH, plain).total
    assert text_tokens(BATCH, replace(plain, shared=False)) == 4000
    assert text_tokens(BATCH, plain) == 2500


def test_a_prompt_is_counted_as_training_counts_it(tmp_path):
    processor, images = tiny_models.llava_onevision_processor(), ImageStore(tmp_path)
    pairs = make_pairs(tmp_path, 4, num_images=(1, 2))
    meter = PromptMeter(processor, images)
    counted = [meter.size(pair.id, pair.prompt, pair.images).tokens for pair in pairs]
    assert counted == [length.prompt for length in pair_lengths(pairs, processor, images)]


def test_operations_are_two_for_each_weight_and_token_and_those_of_attention():
    shape = replace(SEVEN_B, vocabulary=0)
    layers, width = 28 * 233_000_000, 4 * 28 * 3584
    assert text_flops(shape, 100, 0, 0) == pytest.approx(2 * layers * 100 + width * 100 * 50)
    behind = text_flops(shape, 100, 2, 10) - text_flops(shape, 100, 0, 0)
    assert behind == pytest.approx(2 * layers * 20 + width * 20 * 105)


def test_the_plan_says_what_does_not_fit_and_what_would(tmp_path):
    folder = make_project(tmp_path, sample={"num_responses": 3, "max_new_tokens": 8}, dpo={"max_length": 55})
    config = load_config(folder / "align.yaml")
    plan = make_plan(config, Machine(2, gpu_gib=0.0001), response_tokens=8)
    assert len(plan.sizes) == 4
    assert set(plan.too_long) == {size.id for size in plan.sizes if size.tokens + 8 > 55} != set()
    assert not plan.possible
    text = plan_text(plan)
    assert "Nothing is truncated" in text
    assert "missing" in text or "GPUs" in text
    assert set(plan.seconds) == {"sample", "score", "reference", "dpo", "evaluate"}
    roomy = make_plan(config, Machine(2, gpu_gib=80), response_tokens=8)
    assert [fit.strategy for fit in roomy.possible] == ["ddp", "zero2", "zero3", "fsdp2"]
