"""`align plan`: its memory model against measured peaks, and what it says of a run."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import LlavaOnevisionForConditionalGeneration

from align.config import load_config
from align.dpo.texts import pair_lengths
from align.errors import UserError
from align.images import ImageStore
from align.memory import FOUR_BIT_BYTES, GIB, How, StepBatch, text_tokens, training_memory, weight_bytes
from align.plan import Machine, PromptMeter, make_plan, text_flops
from align.plan_text import plan_text
from align.shapes import Kept, ModelShape, Stack, model_shape, with_adapter
from scripts.check_plan import CASES, EXPERTS, SMALL, Case, check
from tests import tiny_models, tiny_vlms
from tests.dpo.conftest import make_pairs
from tests.stage_runs import make_project


@pytest.fixture
def empty():
    """A tiny LLaVA-OneVision without storage."""
    with torch.device("meta"):
        return LlavaOnevisionForConditionalGeneration(tiny_models.llava_onevision_config())


CHECKED = ("small, short", "small, short, checkpointed", "small, everything trained")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHECKED], ids=lambda case: case.name)
def test_the_planned_peak_is_within_fifteen_percent_of_the_measured_one(case):
    planned, measured, _ = check(replace(case, prompt=150))
    assert planned.total == pytest.approx(measured, rel=0.15)


def test_separate_rows_are_planned_with_what_they_repeat():
    planned, measured, _ = check(Case("separate rows", SMALL, prompt=150, shared=False))
    assert planned.total == pytest.approx(measured, rel=0.15)


LAYER = 233_000_000
TEXT = Stack(28, 3584, 3584, 512, 18944, True, True, True, LAYER, 0, LAYER, kept=Kept(26112, 40448, norms=7168))
SEVEN_B = ModelShape(
    weights=7_600_000_000,
    trained=7_600_000_000,
    linear=7_000_000_000,
    frozen_linear=0,
    quantisable=6_500_000_000,
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


def test_an_adapter_is_counted_as_it_will_be_trained(empty):
    shape = model_shape(with_adapter(empty, LoraConfig(r=4, target_modules=["q_proj"], exclude_modules=".*vision.*")))
    # Two layers, 32 wide, 4 query heads of 8: matrices of 32 x 4 and 4 x 32.
    assert shape.trained == shape.parts["adapter"] == 2 * (32 * 4 + 4 * 32)
    assert shape.text.kept == Kept(inputs=32, own_inputs=32, ranks=4)
    memory = training_memory(shape, BATCH, How())
    assert memory.optimiser == 8 * shape.trained
    assert weight_bytes(shape, How(weight_bytes=2)) == 2 * (shape.weights - shape.trained) + 4 * shape.trained


def test_four_bits_hold_what_is_linear_but_not_the_head(empty):
    shape = model_shape(with_adapter(empty, LoraConfig(r=4, target_modules=["q_proj"])))
    head, embeddings = empty.get_output_embeddings().weight, empty.get_input_embeddings().weight
    assert shape.quantisable < shape.weights - head.numel() - embeddings.numel()
    saved = weight_bytes(shape, How()) - weight_bytes(shape, How(quantised=True))
    assert saved == pytest.approx(shape.quantisable * (4 - FOUR_BIT_BYTES) + 2 * shape.trained, abs=1)


def test_an_adapter_on_layers_that_are_not_there_is_told(empty):
    with pytest.raises(UserError, match=r"dpo\.lora: .*not found.*target_modules"):
        with_adapter(empty, LoraConfig(r=4, target_modules=["nothing"]))


def test_all_experts_take_memory_and_those_that_are_chosen_compute():
    with torch.device("meta"):
        model, _ = tiny_vlms.qwen3_vl_moe()
    shape = model_shape(model)
    # Per expert 3 matrices of 32 x 32; four experts, of which a token passes two.
    assert shape.text.layer_weights - shape.text.active_weights == 2 * 3 * 32 * 32
    assert (shape.text.experts, shape.text.top_k, shape.text.inner) == (4, 2, 2 * 32)
    assert shape.weights == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "case",
    [
        Case("LoRA", SMALL, prompt=150, lora={"r": 8, "target_modules": ["q_proj", "down_proj"]}),
        Case("language frozen", SMALL, prompt=150, freeze=("vision", "language")),
        Case("experts", EXPERTS, prompt=150, build="qwen3_vl_moe", shared=False),
    ],
    ids=lambda case: case.name,
)
def test_adapters_frozen_parts_and_experts_are_within_fifteen_percent(case):
    planned, measured, _ = check(case)
    assert planned.total == pytest.approx(measured, rel=0.15)
