"""Steps of the real trainer for every family on a CUDA device that only seems to be there."""

import pytest

from tests import tiny_vlms
from tests.test_family_rounds import SETTINGS

FAMILIES = (*SETTINGS, *tiny_vlms.VLMS)
# Its image tokens see one another, so that it has no shared prefix.
SEPARATE = ("gemma3",)
# The heads of its tiny model are twelve wide, where a fused kernel wants a multiple of eight (the real ones have 128).
NARROW = ("valley_v1_tiny",)
ONE_STEP = {"steps": 1}
VALLEY = "valley_eagle_tiny"
VARIANTS = {
    "separate rows": {"layout": "plain"},
    "an adapter, nothing recomputed": {"lora": True, "checkpointing": False},
    "an adapter, its base as the reference": {"lora": True, "live": True},
    "bf16 weights, a reference beside it": {"dtype": "bfloat16", "live": True},
    "everything trained": {"freeze": []},
    "fsdp2": {"strategy": "fsdp2", "num_processes": 8, "steps": 2},
    "fsdp2, an adapter": {"strategy": "fsdp2", "num_processes": 8, "lora": True},
    "zero2": {"strategy": "zero2", "num_processes": 8, "dtype": "bfloat16"},
    "zero3": {"strategy": "zero3", "num_processes": 8, "dtype": "bfloat16"},
}
SCENARIOS = {
    **{name: {"family": name, "layout": "plain" if name in SEPARATE else "shared"} for name in FAMILIES},
    **{name: {"family": VALLEY, **options} for name, options in VARIANTS.items()},
}
# Where the host may wait for the device in a step. Every wait lets the device run empty, so a new one needs a reason.
WAITS = {
    # Two checks that a step is finite, and the ids of its pairs for when it is not.
    "align/dpo/trainer.py:_stop_unless_finite",
    "align/dpo/trainer.py:compute_loss",
    # Lengths and masks of a row, which came from the host.
    "align/dpo/shared_forward.py:<listcomp>",
    "align/prefix/log_probs.py:hidden_to_stats",
    "align/prefix/plans.py:<genexpr>",
    "align/prefix/plans.py:plan_of",
    # Numbers of images and patches, which transformers' models read as numbers of Python.
    "align/models/",
    "transformers/models/",
    "transformers/vision_utils.py:",
    "transformers/utils/import_utils.py:torch_compilable_check",
    # Whether the gradients are finite and what their norm is, and under ZeRO-3 the lengths that others send.
    "accelerate/utils/deepspeed.py:get_global_grad_norm",
    "deepspeed/runtime/utils.py:is_invalid_grad_norm",
    "deepspeed/runtime/zero/stage_1_and_2.py:has_overflow",
    "deepspeed/runtime/zero/utils.py:assert_lst_len_same_as_other_ranks",
    "deepspeed/runtime/zero/utils.py:get_lst_from_rank0",
    # Metrics.
    "transformers/trainer.py:_run_epoch",
    "trl/trainer/dpo_trainer.py:_compute_loss",
    "autograd (boolean index)",
}


@pytest.fixture(scope="module")
def steps(rehearse):
    found = rehearse([("train", ONE_STEP | options) for options in SCENARIOS.values()])
    return dict(zip(SCENARIOS, found, strict=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_step_finds_every_tensor_on_its_device(steps, name):
    assert "error" not in steps[name], steps[name].get("error")
    assert steps[name]["flops"]["backward"] > 0


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "everything trained"])
def test_frozen_towers_are_not_gone_through_backward(steps, name):
    assert steps[name]["frozen_with_gradients"] == []


def test_the_optimiser_has_every_trained_weight_in_shards_too(steps):
    assert steps["fsdp2"]["optimised"] == steps["fsdp2"]["trained"] > 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_loss_is_computed_from_float32_whatever_shards_the_model(steps, name):
    assert steps[name]["output_dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_host_waits_only_where_it_must(steps, name):
    assert [wait for wait in steps[name]["waits"] if not wait.startswith(tuple(WAITS))] == []


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in NARROW])
def test_attention_is_always_fused(steps, name):
    assert {call[0] for call in steps[name]["attention"]} <= {"flash", "efficient"}


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in (*SEPARATE, *NARROW, "separate rows")])
def test_no_tensor_has_the_square_of_a_row_or_the_vocabulary_for_all_of_it(steps, name):
    row, vocabulary = steps[name]["row_tokens"], steps[name]["vocabulary"]
    responses = steps[name]["response_tokens"]
    prompt = row - responses
    for shape, operation, place, _ in steps[name]["shapes"]:
        assert sum(size >= prompt > 200 for size in shape[-2:]) < 2, (shape, operation, place)
        assert not (vocabulary in shape and shape[0] > responses), (shape, operation, place)
