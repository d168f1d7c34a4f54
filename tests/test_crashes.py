"""Full disks, lost images, signals, kills, moved folders: one clear message, and the same command resumes."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from align.cli import app
from align.config import build_config
from align.records import Samples, parse_line, read_jsonl, write_jsonl
from align.stages.critic_inputs import critic_settings
from tests import tiny_models
from tests.distributed.launches import ROOT, add_run
from tests.dpo.conftest import make_pairs
from tests.forks import Launch, in_a_process
from tests.patience import PATIENCE_S
from tests.stage_runs import (
    SETTINGS,
    Command,
    align_in_two_processes,
    begin_in_two_processes,
    make_project,
    write_lines,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """A run that is ready to be trained for ten steps, with an intermediate state after each."""
    (tmp_path / "images").mkdir()
    tiny_models.save_llava_onevision(tmp_path / "policy")
    write_jsonl(tmp_path / "pairs.jsonl", make_pairs(tmp_path / "images", 20))
    dpo = {"per_device_train_batch_size": 2, "save_steps": 1}
    add_run(tmp_path, "run", policy="./policy", pairs_file="pairs.jsonl", dpo=dpo)
    return tmp_path


def run(folder: Path, *arguments: str, limit_bytes: int | None = None) -> tuple[int, str]:
    return end(Command(folder, *arguments, limit_bytes=limit_bytes))


def end(command: Command) -> tuple[int, str]:
    done = command.end()
    return done.returncode, done.stdout + done.stderr


def wait_until(process: Command | Launch, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert process.poll() is None, process.end()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "runs/run/round-1/checkpoint/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_a_full_disk_ends_training_with_one_line_and_it_goes_on_when_there_is_room(folder):
    round_ = folder / "runs/run/round-1"
    arguments = ("dpo", "--config", "run.yaml")
    code, output = run(folder, *arguments, limit_bytes=60_000)
    assert code == 2, output
    assert "Traceback" not in output
    assert "File too large" in output
    assert "make room on the disk; the same command resumes" in output
    assert not (round_ / "checkpoint").exists()
    code, output = run(folder, *arguments)
    assert code == 0, output
    assert len(losses(folder)) == 10
    assert not [path.name for path in round_.iterdir() if path.name.endswith(".tmp")]


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(folder):
    code, output = run(folder, "dpo", "--config", "run.yaml", "--set", "run_root=/proc/nowhere")
    assert code == 2, output
    assert "Traceback" not in output
    assert "the folder cannot be made" in output


def test_a_loss_that_is_no_number_names_the_pairs_and_keeps_the_state_before(folder):
    code, output = run(folder, "dpo", "--config", "run.yaml", "--set", "dpo.learning_rate=1e30")
    assert code == 2, output
    assert "Traceback" not in output
    assert "at step 2, with the pairs p" in output
    state = folder / "runs/run/round-1/trainer/checkpoint-1"
    assert str(state) in output
    assert (state / "model.safetensors").is_file()


def test_two_processes_told_to_stop_save_their_step_and_go_on_to_the_end_of_one_process(folder):
    """As their launcher tells them (`tests/launched`); other strategies: tests/distributed."""
    whole = shutil.copytree(folder, folder.with_name("whole"))
    assert run(whole, "dpo", "--config", "run.yaml")[0] == 0
    spread = ("--set", "dpo.per_device_train_batch_size=1", "--set", "dpo.save_steps=100")
    arguments = ("dpo", "--config", "run.yaml", *spread)
    both = begin_in_two_processes(folder, *arguments)
    round_ = folder / "runs/run/round-1"
    wait_until(both, lambda: num_lines(round_ / "trainer/metrics.jsonl") >= 2)
    both.terminate()
    said = both.end()
    assert re.search(r"stopped at step \d of 10; `align dpo --round 1` resumes from there", said)
    assert not (round_ / "checkpoint").exists()
    done = num_lines(round_ / "trainer/metrics.jsonl")
    assert 2 <= done < 10
    assert (round_ / f"trainer/checkpoint-{done}/trainer_state.json").is_file()
    align_in_two_processes(folder, *arguments)
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)


def test_a_lost_image_costs_its_questions_and_sigterm_none(tmp_path):
    folder = make_project(tmp_path / "project")
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    many = [q | {"id": f"{q['id']}-{n}", "question": f"{n}: {q['question']}"} for n in range(40) for q in questions]
    write_lines(folder / "questions.jsonl", many)
    part = folder / "runs/run/round-1/samples.part-0.jsonl"
    process = Command(folder, "sample")
    wait_until(process, lambda: num_lines(part) >= 2)
    process.send_signal(signal.SIGTERM)
    code, output = end(process)
    assert code == 0, output
    assert "the same command resumes from here" in output
    sampled = part.read_text().splitlines()[: num_lines(part)]
    process = Command(folder, "sample")
    wait_until(process, lambda: num_lines(part) > len(sampled))
    lost = folder / "images/3.png"
    picture = lost.read_bytes()
    lost.unlink()
    code, output = end(process)
    assert code == 0, output
    assert "there is no image 'images/3.png'" in output
    assert num_lines(folder / "runs/run/round-1/samples.jsonl") < len(many)
    lost.write_bytes(picture)
    code, output = run(folder, "sample", "--redo", "--keep-unchanged")
    assert code == 0, output
    final = read_jsonl(folder / "runs/run/round-1/samples.jsonl", Samples)
    assert [line.id for line in final] == [question["id"] for question in many]
    by_id = {line.id: line for line in final}
    assert all(by_id[line.id] == line for line in (parse_line(text, Samples, "part") for text in sampled))


@pytest.mark.parametrize("adapter", [{}, {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}])
def test_a_run_that_was_moved_goes_on_in_its_new_place(tmp_path, adapter):
    dpo: dict[str, Any] = SETTINGS["dpo"]  # type: ignore[assignment]
    folder = make_project(tmp_path / "here", dpo=dpo | adapter)
    run = CliRunner().invoke(app, ["run", "--rounds", "1", "--config", str(folder / "align.yaml")])
    assert run.exit_code == 0, run.output
    moved = folder.rename(tmp_path / "there")
    before = {path: path.stat().st_mtime_ns for path in (moved / "runs").rglob("*.jsonl")}
    run = CliRunner().invoke(app, ["run", "--rounds", "2", "--config", str(moved / "align.yaml")])
    assert run.exit_code == 0, run.output
    assert before == {path: path.stat().st_mtime_ns for path in before}
    one, two = (load_file(moved / f"runs/run/round-{n}/checkpoint/model.safetensors") for n in (1, 2))
    moved_weights = {name for name in one if (one[name] != two[name]).any()}
    assert moved_weights
    if adapter:
        # The second round began with the first one's adapter merged, and moved nothing but where its own was.
        assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in moved_weights)
    assert not folder.exists()


def test_where_the_members_of_a_panel_lie_is_no_setting(tmp_path):
    critics = {"reader": {"kind": "pairwise", "model": "./critic"}, "checker": {"kind": "verifier"}}
    data = {"policy": "./policy", "questions": "q.jsonl", "critic": {"kind": "panel", "options": {"critics": critics}}}
    here, there = (critic_settings(build_config(data, base=tmp_path / place).critic) for place in ("here", "there"))
    assert here == there
    assert here["options"]["critics"]["reader"] == {"kind": "pairwise"}


def test_every_stage_may_be_killed_at_any_moment(tmp_path):
    """A kill a stage; `scripts/fault_test.py` alone does many."""
    assert in_a_process(run_fault_test, tmp_path / "run").count("| equal |") == 5


def run_fault_test(folder: Path) -> None:
    sys.argv = ["scripts/fault_test.py", "--kills", "1", "--seed", "1", "--folder", str(folder)]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
