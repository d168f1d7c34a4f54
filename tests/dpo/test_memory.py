"""Running out of memory in training: smaller batches, the same steps."""

from __future__ import annotations

import pytest
import torch

from align.dpo.stage import DpoStage
from align.dpo.train import run_dpo
from align.errors import UserError, is_out_of_memory
from tests.dpo.test_train import history, make_run, round_1, weights


def make_small(monkeypatch, largest: int, from_step: int = 0) -> None:
    """Give the trained model a device that has room for so many pairs at a time."""
    make_trainer = DpoStage.make_trainer

    def with_little_memory(self, *args, **named):
        trainer = make_trainer(self, *args, **named)

        def allocate(module, inputs, kwargs):
            if trainer.state.global_step >= from_step and len(kwargs["attention_mask"]) > largest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        trainer.model.model.register_forward_pre_hook(allocate, with_kwargs=True)
        return trainer

    monkeypatch.setattr(DpoStage, "make_trainer", with_little_memory)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_also_ends_in_the_libraries_below_torch(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(ValueError(said))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("from_step", [0, 2])
def test_training_goes_on_with_smaller_batches_and_the_same_steps(tmp_path, monkeypatch, from_step):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": 1}
    plenty = make_run(tmp_path, name="plenty", num_pairs=8, dpo=sizes)
    run_dpo(plenty, 1)
    short = make_run(tmp_path, name="short", num_pairs=8, dpo=sizes)
    with monkeypatch.context() as patch:
        make_small(patch, 1, from_step)
        run_dpo(short, 1)
    one, other = (round_1(config).checkpoint for config in (plenty, short))
    assert [e["step"] for e in history(one)] == [e["step"] for e in history(other)] == [1, 2, 3, 4]
    for a, b in zip(history(one), history(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    before, expected, found = weights(tmp_path / "policy"), weights(one), weights(other)
    for name in (name for name in before if not name.endswith("k_proj.bias")):
        moved = (expected[name] - before[name]).norm()
        assert (expected[name] - found[name]).norm() <= 1e-2 * moved + 1e-6, name
    notes = round_1(short).manifest.stage("dpo").notes
    assert notes["batch"] == "memory ran out: 1 rows at a time, 4 times per step"
    assert "batch" not in round_1(plenty).manifest.stage("dpo").notes


def test_a_single_pair_that_does_not_fit_ends_with_advice(tmp_path, monkeypatch):
    config = make_run(tmp_path, dpo={"per_device_train_batch_size": 1})
    make_small(monkeypatch, 0)
    with pytest.raises(UserError, match=r"out of memory with a single row.*zero3"):
        run_dpo(config, 1)


def test_a_budget_of_tokens_that_does_not_fit_is_not_changed_in_secret_and_ends_with_advice(tmp_path, monkeypatch):
    config = make_run(tmp_path, dpo={"rows": "question", "tokens_per_batch": 250})
    make_small(monkeypatch, 0)
    with pytest.raises(
        UserError, match=r"out of memory with dpo.tokens_per_batch: 250.*lower it, down to the longest row.*zero3"
    ):
        run_dpo(config, 1)
    assert not (round_1(config).trainer / "batch.json").exists()
