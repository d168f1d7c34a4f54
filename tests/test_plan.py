"""`align plan`: its memory model against measured peaks, and what it says of a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import LlavaOnevisionForConditionalGeneration

from align.config import Config, load_config
from align.dpo.step_memory import FOUR_BIT_BYTES, GIB, How, StepBatch, text_tokens, training_memory, weight_bytes
from align.engines.open import open_engine
from align.errors import UserError
from align.media.images import ImageStore
from align.models.meta import model_to_train, with_adapter
from align.models.shapes import Kept, ModelShape, Stack, model_shape
from align.plan.make import Changes, Machine, make_plan, sharing
from align.plan.prompt_sizes import PromptMeter, PromptSize
from align.plan.speed import ATTENTION_SHARE, Cost, Speed, passes_of, touched_weights
from align.plan.text import plan_text
from align.plan.times import Training, training_steps
from align.records import read_questions
from reward.critics import Item, make_critic
from scripts.check_plan import CASES, EXPERTS, SMALL, WIDE, Case, check
from tests import tiny_models, tiny_vlms
from tests.dpo.conftest import make_pairs, tokenized
from tests.stage_runs import make_project


@pytest.fixture
def empty():
    """A tiny LLaVA-OneVision without storage."""
    with torch.device("meta"):
        return LlavaOnevisionForConditionalGeneration(tiny_models.llava_onevision_config())


CHECKED = ("small, short", "small, short, checkpointed", "small, everything trained")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHECKED], ids=lambda case: case.name)
def test_the_planned_peak_is_within_ten_percent_of_the_measured_one(case):
    planned, measured, _ = check(replace(case, prompt=150))
    assert planned.total == pytest.approx(measured, rel=0.1)


def test_separate_rows_are_planned_with_what_they_repeat():
    planned, measured, _ = check(Case("separate rows", SMALL, prompt=150, shared=False))
    assert planned.total == pytest.approx(measured, rel=0.1)


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
    assert counted == [pair.prompt_tokens for pair in tokenized(pairs, processor, images)]


# One operation takes a second, and so does one byte.
UNIT = Machine(tflops=1e-12, bandwidth_gbs=1e-9, layer_us=1e6, waits=True)
FREE = Machine(tflops=1e-12, bandwidth_gbs=1e30, layer_us=0, waits=True)


def test_operations_are_two_for_each_weight_and_token_and_attention_is_slower():
    layer = replace(TEXT, num_layers=1)
    products = Speed(SEVEN_B, FREE, 2).layers(layer, tokens=100, scores=0).work
    assert products == pytest.approx(2 * LAYER * 100)
    attended = Speed(SEVEN_B, FREE, 2).layers(layer, tokens=100, scores=5000).work - products
    assert attended == pytest.approx(4 * 3584 * 5000 / ATTENTION_SHARE)


def test_few_tokens_take_as_long_as_reading_the_weights():
    only_reading = replace(FREE, tflops=1e30, bandwidth_gbs=1e-9)
    layer = replace(TEXT, num_layers=1)
    one, two = (Speed(SEVEN_B, only_reading, 2).layers(layer, tokens=n, scores=0).work for n in (1, 2))
    assert one == pytest.approx(2 * (LAYER + passes_of(layer)))
    assert two - one == pytest.approx(2 * passes_of(layer))


def test_a_layer_is_started_once_a_call_and_a_gpu_does_not_wait_for_it():
    cost = Speed(SEVEN_B, UNIT, 2).layers(replace(TEXT, num_layers=3), tokens=1, scores=0, calls=2)
    assert cost.start == 6
    assert cost.seconds(UNIT) == cost.work + 6
    assert Cost(2.0, 5.0).seconds(replace(UNIT, waits=False)) == 5.0


def test_of_experts_only_those_that_a_token_chooses_are_read():
    mixture = replace(TEXT, experts=8, top_k=2, layer_weights=800 + 200, active_weights=200 + 200)
    assert touched_weights(mixture, 1) == pytest.approx(400)
    # A second token chooses each of the others with probability 1/4: 200 + 800 x (1 - (3/4)^2).
    assert touched_weights(mixture, 2) == pytest.approx(200 + 800 * 7 / 16)
    assert touched_weights(mixture, 1e6) == pytest.approx(1000)


def test_a_step_goes_forward_and_backward_and_an_adapter_needs_half_of_the_way_back():
    layers = replace(TEXT, num_layers=1)
    whole = replace(SEVEN_B, text=layers, vocabulary=1, trained=0)
    frozen = replace(whole, text=replace(layers, frozen_linear=LAYER, kept=Kept()))
    size = [PromptSize("q", 100, 0, 0, 0)]
    training = Training(1, 10, 10, 1, 8, checkpointing=False, shared=True, live=False, frozen_towers=True)
    machine = replace(FREE, tflops=1e-12)
    # Of the prompt but for its last token the only layer makes keys and values, here from a width of 1.
    forward = 2 * LAYER * 21 + 2 * 2 * layers.key * 99

    def products(shape, **changes):
        speed = Speed(replace(shape, text=replace(shape.text, query=0, hidden=1)), machine, 2)
        return training_steps(speed, size, replace(training, **changes)).work

    assert products(whole) == pytest.approx(3 * forward, rel=1e-6)
    assert products(frozen) == pytest.approx(2 * forward, rel=1e-6)
    assert products(whole, checkpointing=True) == pytest.approx(4 * forward, rel=1e-6)


def test_a_critic_is_counted_by_asking_it(tmp_path):
    folder = make_project(tmp_path, critic={"kind": "pairwise", "model": "./critic"})
    config = load_config(folder / "align.yaml")
    plan = make_plan(config, Machine(1), response_tokens=8)
    by_name = {stage.name: stage for stage in plan.stages}
    engine = open_engine(str(folder / "critic"), config.model, open_image=ImageStore(folder).open)
    asked = []
    engine.log_probs = lambda prompts: (
        asked.extend(prompts) or [np.zeros((len(a.branches), len(a.options))) for a in prompts]
    )
    tokenizer = engine.prompter.tokenizer
    responses = tuple(tokenizer.decode(tokenizer.encode(f"{k} and a cat on a mat, ")[:8]) for k in range(3))
    items = [
        Item(id=q.id, question=q.as_text(), images=tuple(q.images), responses=responses)
        for q in read_questions(folder / "questions.jsonl")
    ]
    make_critic("pairwise", {}, judge_model=engine).judge(items)
    tokens = 0
    for branched in asked:
        tree = engine.prompter.build_tree(branched)
        inputs = engine.prompter.encode([tree.prompt], [branched.images])
        tokens += inputs["input_ids"].shape[1] + sum(len(segment.token_ids) for segment in tree.segments)
        tokens += len(tree.leaf_segments) * sum(len(option) - 1 for option in tree.options)
    # Each of the four questions twice more, with a blank and with another image.
    assert by_name["score"].read_tokens == pytest.approx(3 * tokens, rel=0.02)
    # Each round against the first policy, and the second against the first.
    assert by_name["win rate"].runs == 3
    assert by_name["evaluate"].runs == 3


def test_tokens_of_a_stage_are_those_of_the_data(tmp_path):
    folder = make_project(tmp_path, sample={"num_responses": 3, "max_new_tokens": 8})
    plan = make_plan(load_config(folder / "align.yaml"), Machine(1), response_tokens=8)
    by_name = {stage.name: stage for stage in plan.stages}
    assert by_name["sample"].read_tokens == sum(size.tokens for size in plan.sizes)
    assert by_name["sample"].written_tokens == 4 * 3 * 8
    assert by_name["dpo"].read_tokens == sum(size.tokens for size in plan.sizes) + 4 * 2 * 8
    assert plan.gpu_hours == pytest.approx(sum(s.seconds * s.runs for s in plan.stages) / 3600)
    assert json.loads(json.dumps(plan.as_dict()))["stages"][0]["name"] == "sample"


def test_a_question_in_one_row_is_read_once_with_all_its_responses(tmp_path):
    folder = make_project(tmp_path, sample={"num_responses": 3, "max_new_tokens": 8}, pairs={"max_per_question": 3})
    read, rows = {}, {}
    for name, settings in {
        "pair": [],
        "question": ["dpo.rows=question"],
        "budget": ["dpo.rows=question", "dpo.tokens_per_batch=300"],
    }.items():
        plan = make_plan(load_config(folder / "align.yaml", settings), Machine(1), response_tokens=8)
        read[name] = next(stage.read_tokens for stage in plan.stages if stage.name == "dpo")
        rows[name] = plan.fits[0].memory.activations
    preference = ["dpo.image_preference.corruption=crop"]
    plan = make_plan(load_config(folder / "align.yaml", preference), Machine(1), response_tokens=8)
    prompts = sum(size.tokens for size in plan.sizes)
    # The corrupted pictures of every pair once more, with the chosen response.
    assert next(s.read_tokens for s in plan.stages if s.name == "dpo") == 3 * (2 * prompts + 4 * 3 * 8)
    assert read["pair"] == 3 * (prompts + 4 * 2 * 8)
    assert read["question"] == read["budget"] == prompts + 4 * 3 * 8
    assert rows["pair"] < rows["question"] < rows["budget"]


def test_the_plan_says_what_does_not_fit_and_what_would(tmp_path):
    folder = make_project(tmp_path, sample={"num_responses": 3, "max_new_tokens": 8}, dpo={"max_length": 55})
    config = load_config(folder / "align.yaml")
    plan = make_plan(config, Machine(2, gpu_gib=0.0001), response_tokens=8)
    assert len(plan.sizes) == 4
    assert set(plan.too_long) == {size.id for size in plan.sizes if size.tokens < 55 < size.tokens + 8} != set()
    assert not plan.possible
    text = " ".join(plan_text(plan, width=80).split())
    assert "nothing is truncated: such pairs would stop the run" in text
    assert "nothing that is known here helps" in text
    assert set(plan.seconds) == {"sample", "score", "reference", "dpo", "evaluate"}
    roomy = make_plan(config, Machine(2, gpu_gib=80), response_tokens=8)
    assert [fit.strategy for fit in roomy.possible] == ["ddp", "zero2", "zero3", "fsdp2"]
    assert roomy.changes == []


def test_prompts_that_can_never_fit_are_told_apart(tmp_path):
    folder = make_project(tmp_path, dpo={"max_length": 40})
    plan = make_plan(load_config(folder / "align.yaml"), Machine(1), response_tokens=8)
    assert len(plan.never_fit) == 4
    assert plan.too_long == []
    assert "4 prompts alone pass the limit of 40 tokens" in plan_text(plan, width=110)


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_keeps_to_the_terminal(tmp_path, width):
    folder = make_project(tmp_path, critic={"kind": "pairwise", "model": "./critic"}, dpo={"max_length": 55})
    plan = make_plan(load_config(folder / "align.yaml"), Machine(8, gpu_gib=0.0005), response_tokens=8)
    assert max(map(len, plan_text(plan, width=width).splitlines())) <= width


def test_the_cheapest_change_that_fits_is_named():
    machine = Machine(8, gpu_gib=80)
    config = Config(policy="none", questions="q.jsonl")

    def named(machine, how, batch=BATCH):
        return [change.settings for change in Changes(config, SEVEN_B, batch, how, machine).found()]

    eight = replace(ON_GPU, num_processes=8)
    assert named(machine, eight) == ["launch.strategy=zero2"]
    # 16 bytes for each of 7.6 billion weights over 8: only what spreads them all.
    assert named(replace(machine, gpu_gib=34), eight) == ["launch.strategy=zero3"]
    one = Machine(1, gpu_gib=160)
    tight = replace(ON_GPU, checkpointing=False)
    long = StepBatch(4, 4000, 1000, 1000)
    assert named(one, tight, long)[0].startswith("dpo.gradient_checkpointing=true")


@pytest.mark.parametrize("frozen", [[], ["vision"], ["language"]])
def test_an_adapter_is_proposed_with_the_parts_that_it_is_planned_without(tmp_path, frozen):
    folder = make_project(tmp_path, dpo={"freeze": frozen})
    config = load_config(folder / "align.yaml")
    shape = model_shape(model_to_train(config.policy, config.dpo.lora, config.dpo.freeze))
    *_, adapted, _ = Changes(config, shape, BATCH, ON_GPU, Machine(1))._of_training()
    freeze = "" if frozen == ["vision"] else ", dpo.freeze=[vision]"
    assert adapted.settings.startswith(f"dpo.lora={{r: 16, target_modules: [...]}}{freeze}, ")
    assert adapted.memory.optimiser > 0


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
        Case("wide, language frozen", WIDE, prompt=600, freeze=("vision", "language")),
        Case("experts", EXPERTS, prompt=150, build="qwen3_vl_moe", shared=False),
    ],
    ids=lambda case: case.name,
)
def test_adapters_frozen_parts_and_experts_are_within_ten_percent(case):
    planned, measured, _ = check(case)
    assert planned.total == pytest.approx(measured, rel=0.1)


def test_before_training_only_zero3_has_the_model_in_pieces(tmp_path):
    folder = make_project(tmp_path)

    def reference(strategy):
        config = load_config(folder / "align.yaml", [f"launch.strategy={strategy}"])
        return next(w.memory for w in make_plan(config, Machine(4), response_tokens=8).whole if w.name == "reference")

    assert reference("zero3").weights == reference("zero2").weights // 4
    assert reference("ddp").weights == reference("fsdp2").weights == reference("zero2").weights


def test_experts_are_trained_without_shared_prompts_and_sampled_with_them():
    with torch.device("meta"):
        model, _ = tiny_vlms.qwen3_vl_moe()
        dense, _ = tiny_vlms.qwen3_vl()
    config = Config(policy="none", questions="q.jsonl")
    in_training, elsewhere, notes = sharing(config, model)
    # In transformers 5.17 the text part of this family has no load-balancing loss.
    balanced = hasattr(model.config.get_text_config(), "output_router_logits")
    assert (in_training, elsewhere) == (not balanced, True)
    assert ["load-balancing" in note for note in notes] == [True] * balanced
    assert sharing(config, dense) == (True, True, [])
    assert sharing(Config(policy="none", questions="q.jsonl", shared_prefix="off"), dense) == (False, False, [])


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_no_part_of_the_memory_is_negative(strategy, accumulates):
    how = replace(ON_GPU, strategy=strategy, num_processes=8, accumulates=accumulates)
    memory = training_memory(SEVEN_B, BATCH, how)
    parts = [memory.weights, memory.gradients, memory.optimiser, memory.activations, memory.working, memory.batch]
    assert min(parts) >= 0
    accumulated = training_memory(SEVEN_B, BATCH, replace(how, accumulates=True))
    if strategy in ("zero2", "zero3"):
        assert memory == accumulated
    assert memory.total <= accumulated.total
