"""A run in processes that the command starts by itself, told to stop in its training: it ends as in one process.

Everything here is real, and slow for that; other tests fork processes that have imported what a command needs.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.patience import PATIENCE_S, wait_until
from tests.stage_runs import SETTINGS, align, make_project

RUN = ("run", "--rounds", "1")
TRAINING = {**SETTINGS["dpo"], "num_train_epochs": 8, "save_steps": 100}
SAME = ("samples.jsonl", "scores.jsonl", "pairs.jsonl")


def begin(folder, *arguments):
    command = [sys.executable, "-m", "align", *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=pipe, stderr=pipe, text=True)


def test_a_run_in_two_processes_told_to_stop_goes_on_to_the_end_of_one_process(tmp_path):
    one = make_project(tmp_path / "one", dpo=TRAINING, evaluate={})
    two = shutil.copytree(one, tmp_path / "two")
    alone = align(one, *RUN)
    assert alone.returncode == 0, alone.stderr
    spread = (*RUN, "--set", "launch.num_processes=2", "--set", "dpo.per_device_train_batch_size=1")
    first = begin(two, *spread)
    steps = two / "runs/run/round-1/trainer/metrics.jsonl"
    wait_until(lambda: first.poll() is not None or (steps.is_file() and steps.read_bytes().count(b"\n")))
    assert first.poll() is None, first.communicate()
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 0, err
    assert "stopped at step" in out + err
    assert "the same command resumes from here" in out + err
    second = begin(two, *spread)
    out, err = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, err
    mine, theirs = (folder / "runs/run/round-1" for folder in (two, one))
    for name in SAME:
        assert (mine / name).read_text() == (theirs / name).read_text(), name
    trained, expected = (load_file(folder / "checkpoint/model.safetensors") for folder in (mine, theirs))
    assert trained.keys() == expected.keys()
    for name, weights in trained.items():
        assert weights.float().numpy() == pytest.approx(expected[name].float().numpy(), abs=1e-4), name
