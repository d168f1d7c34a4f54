"""8-bit AdamW with stochastic rounding: bfloat16 weights move as float32 ones do, and the plan knows the memory."""

from __future__ import annotations

import copy

import pytest
import torch

from align.dpo.optimizers import ROUNDING, ROUNDING_ARGUMENT, check_rounding, is_known, state_bytes
from align.dpo.step_memory import How, StepBatch, training_memory
from align.errors import UserError
from align.models.shapes import model_shape
from tests.dpo.conftest import make_args, make_pairs, train_ours

ROUNDED = {"optim": ROUNDING[0], "optim_args": f"{ROUNDING_ARGUMENT}=True"}


@pytest.fixture
def eager():
    """torchao compiles its step, which takes most of a minute on a CPU and changes no number that is looked at here."""
    pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        yield


def moved(model, pairs, images, processor, folder, *, dtype, **fields):
    """How far every weight has gone in some steps, as one vector of float32."""
    start = copy.deepcopy(model).to(dtype)
    constant = {"learning_rate": 5e-7, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 3}
    args = make_args(folder, **constant, **fields)
    trained = train_ours(
        start, processor, pairs, images, args, layout="shared", reference=[(-20.0, -20.0)] * len(pairs)
    )
    ways = zip(trained.model.parameters(), start.parameters(), strict=True)
    return torch.cat([(after.detach().float() - before.detach().float()).flatten() for after, before in ways])


def test_steps_of_5e_7_arrive_in_bfloat16_weights_when_they_are_rounded_at_random(
    eager, model, processor, images, tmp_path
):
    pairs = make_pairs(images.root, 6)
    given = (model, pairs, images, processor, tmp_path)
    exact = moved(*given, dtype=torch.float32, optim="adamw_torch")
    rounded = moved(*given, dtype=torch.bfloat16, **ROUNDED)
    nearest = moved(*given, dtype=torch.bfloat16, optim="adamw_torch")
    # The share of the way that was to be gone, over all weights: rounding errors have no direction and cancel.
    arrived, lost = ((way @ exact / (exact @ exact)).item() for way in (rounded, nearest))
    assert arrived == pytest.approx(1, abs=0.25)
    assert abs(lost) < 0.1


def test_resuming_gives_the_weights_of_the_training_that_was_not_stopped(eager, model, processor, images, tmp_path):
    pairs = make_pairs(images.root, 4)
    model = model.to(torch.bfloat16)
    args = make_args(
        tmp_path, learning_rate=1e-4, save_strategy="steps", save_steps=1, max_steps=2, warmup_steps=0, **ROUNDED
    )
    reference = [(-20.0, -20.0)] * len(pairs)
    straight, resumed, other = (
        train_ours(model, processor, pairs, images, args, reference=reference, resume=place and str(tmp_path / place))
        for place in (None, "checkpoint-1", "checkpoint-2")
    )
    assert resumed.state.global_step == 2
    for one, another, last in zip(*(trainer.model.parameters() for trainer in (straight, resumed, other)), strict=True):
        assert torch.equal(one, another)
        assert torch.equal(one, last)


@pytest.mark.parametrize("name", ROUNDING)
def test_states_take_the_memory_that_is_planned(eager, name):
    from torchao.optim import AdamW4bit, AdamW8bit

    weight = torch.nn.Parameter(torch.zeros(64, 1024, dtype=torch.bfloat16))
    optimizer = (AdamW4bit if "4bit" in name else AdamW8bit)([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    parts = [
        getattr(state, part) for state in optimizer.state[weight].values() for part in ("codes", "scale") if state.ndim
    ]
    assert sum(part.nbytes for part in parts) / weight.numel() == pytest.approx(state_bytes(name, 2))


def test_two_bytes_instead_of_eight_stand_in_the_plan(model):
    shape, batch = model_shape(model), StepBatch(1, 100, 20, 20)
    half = How(weight_bytes=2, compute_bytes=2)
    usual, small = (
        training_memory(shape, batch, how) for how in (half, How(**vars(half) | {"optimizer": ROUNDING[0]}))
    )
    assert usual.optimiser == 4 * shape.trained
    assert small.optimiser == round(state_bytes(ROUNDING[0], 2) * shape.trained)
    assert is_known("paged_adamw_8bit")
    assert not is_known("galore_adamw")


@pytest.mark.parametrize(
    ("fields", "dtype", "options", "message"),
    [
        ({"optim_args": ROUNDED["optim_args"]}, torch.bfloat16, {}, "adamw_torch does not read"),
        (ROUNDED, torch.float32, {}, "not bfloat16 but float32"),
        (ROUNDED, torch.bfloat16, {"adapter": True}, "an adapter in float32"),
        (ROUNDED, torch.bfloat16, {"strategy": "zero3"}, "a float32 copy"),
    ],
)
def test_rounding_that_would_do_nothing_is_refused(fields, dtype, options, message):
    with pytest.raises(UserError, match=message):
        check_rounding(fields, dtype, **{"adapter": False} | options)


def test_steps_that_would_be_lost_are_announced():
    assert "are lost" in str(check_rounding({}, torch.bfloat16, adapter=False))
    for fields, dtype, options in [
        (ROUNDED, torch.bfloat16, {}),
        ({}, torch.float32, {}),
        ({}, torch.bfloat16, {"adapter": True}),
        ({}, torch.bfloat16, {"strategy": "zero2"}),
    ]:
        assert check_rounding(fields, dtype, **{"adapter": False} | options) is None
