"""Trainer checkpoints: whole or not used; a stop is obeyed at any step; a full disk is one message."""

from __future__ import annotations

import logging
import resource
import shutil
import signal

import pytest
import torch

from align.dpo.train import run_dpo
from align.dpo.trainer_checkpoints import MANIFEST, fault_of, last_checkpoint
from align.errors import UserError
from tests.dpo.test_train import history, make_run, round_1, stop_once, weights

EVERY_STEP = {"save_steps": 1, "save_total_limit": 3}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of a run that nothing stopped."""
    config = make_run(tmp_path_factory.mktemp("straight"), dpo=EVERY_STEP)
    run_dpo(config, 1)
    return weights(round_1(config).checkpoint)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after step 5, with whole trainer checkpoints of the steps 3, 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped")
    config = make_run(folder, dpo=EVERY_STEP)
    with pytest.MonkeyPatch.context() as patch:
        stop_once(patch, 4)
        with pytest.raises(SystemExit):
            run_dpo(config, 1)
    found = {path.name for path in round_1(config).trainer.glob("checkpoint-*")}
    assert found == {"checkpoint-3", "checkpoint-4", "checkpoint-5"}
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", cut),
        ("optimizer.pt", flip),
        ("trainer_state.json", empty),
        ("model.safetensors", cut),
        ("scheduler.pt", empty),
        ("rng_state.pth", flip),
        (MANIFEST, cut),
    ],
)
def test_a_damaged_trainer_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, stopped, name, damage):
    shutil.copytree(stopped / "runs" / "run" / "round-1" / "trainer", tmp_path / "trainer")
    newest = tmp_path / "trainer" / "checkpoint-5"
    assert last_checkpoint(tmp_path / "trainer", 1) == newest
    damage(newest / name)
    assert last_checkpoint(tmp_path / "trainer", 1) == tmp_path / "trainer" / "checkpoint-4"
    reason = "it was not written to its end" if name == MANIFEST else f"{name} is damaged"
    assert f"checkpoint-5 is not used and is removed: {reason}" in caplog.text
    damage(tmp_path / "trainer" / "checkpoint-4" / name)
    assert last_checkpoint(tmp_path / "trainer", 1) == tmp_path / "trainer" / "checkpoint-3"


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one_to_the_same_weights(
    tmp_path, caplog, stopped, straight
):
    shutil.copytree(stopped, tmp_path / "copy")
    config = make_run(tmp_path / "copy", dpo=EVERY_STEP)
    this = round_1(config)
    flip(this.trainer / "checkpoint-5" / "optimizer.pt")
    with caplog.at_level(logging.INFO):
        run_dpo(config, 1)
    assert f"training resumes from {this.trainer / 'checkpoint-4'}" in caplog.text
    assert [entry["step"] for entry in history(this.checkpoint)] == [1, 2, 3, 4, 5, 6]
    found = weights(this.checkpoint)
    assert all(torch.equal(found[tensor], straight[tensor]) for tensor in straight)


def test_a_checkpoint_of_fewer_processes_is_not_that_of_more(stopped):
    newest = stopped / "runs" / "run" / "round-1" / "trainer" / "checkpoint-5"
    assert fault_of(newest, 1) is None
    assert fault_of(newest, 2) == "it is that of fewer processes (rng_state_0.pth is missing)"


def test_a_stop_in_the_last_step_is_not_forgotten(tmp_path, monkeypatch, straight):
    config = make_run(tmp_path, dpo=EVERY_STEP)
    this = round_1(config)
    with monkeypatch.context() as patch:
        stop_once(patch, 5)
        with pytest.raises(SystemExit) as exit_:
            run_dpo(config, 1)
    assert exit_.value.code == 0
    assert not this.manifest.complete("dpo")
    run_dpo(config, 1)
    assert this.manifest.complete("dpo")
    found = weights(this.checkpoint)
    assert all(torch.equal(found[tensor], straight[tensor]) for tensor in straight)


def test_a_disk_that_fills_while_a_trainer_checkpoint_is_written_is_one_message(tmp_path):
    config = make_run(tmp_path, dpo={"save_steps": 2})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    # The weights go through, the optimiser's two moments of each do not.
    largest = int(1.5 * (tmp_path / "policy" / "model.safetensors").stat().st_size)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(UserError, match=r"the trainer checkpoint of step 2 cannot be written: .*make room"):
            run_dpo(config, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(round_1(config).trainer.glob("checkpoint-*"))
    run_dpo(config, 1)
    assert round_1(config).manifest.complete("dpo")
