"""Processes that the command starts fail: one message, with exit code 2 where a person can fix it and 1 where not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from align.config import LaunchSettings, build_config
from align.distributed import launch
from align.distributed.launch import launch_command, raise_collected, run_processes
from align.distributed.worker_errors import LOST
from align.errors import UserError
from tests.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]


def faulty(*commands: str) -> list[str]:
    """One process a command of `tests.distributed.faulty`, started as `align` starts its stages."""
    command = launch_command(LaunchSettings(num_processes=len(commands)), list(commands))
    command[command.index("align")] = "tests.distributed.faulty"
    return command


def launched(*commands: str):
    return run_processes(faulty(*commands))


@pytest.fixture
def from_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_fault_of_one_process_ends_the_launch_with_that_one_message(from_root, capfd):
    ended = launched("lost", "bad-key")
    # Which of the two codes the launcher sees depends on who is gone first; what is said does not.
    assert ended.code in (1, 2)
    said, errors = capfd.readouterr()
    # Without any network torch itself says that a host has no name.
    assert [line for line in errors.splitlines() if "[c10d]" not in line] == [], "the processes themselves say nothing"
    assert said == ""
    with pytest.raises(UserError) as error:
        raise_collected(ended, "`align dpo`")
    assert str(error.value) == "process 1: align.yaml: there is no key 'polcy'; did you mean 'policy'?"


def test_a_crash_is_shown_with_one_traceback_and_a_killed_process_by_its_signal(from_root, capfd, caplog):
    caplog.set_level("ERROR", logger="align")
    ended = launched("lost", "crash")
    with pytest.raises(SystemExit) as exit_:
        raise_collected(ended, "`align dpo`")
    assert (exit_.value.code, ended.code) == (1, 1)
    assert capfd.readouterr().err.count("Traceback") == 0
    (one,) = ended.faults
    assert one.message.startswith("process 1: Traceback")
    assert one.message.endswith("ZeroDivisionError: in process 1")
    ended = launched("fine", "killed")
    assert ended.code == 1
    assert [one.message for one in ended.faults] == [
        "process 1: ended by SIGKILL: the machine's memory may have run out"
    ]


def test_a_launch_told_to_stop_lets_its_processes_finish(from_root, tmp_path, monkeypatch, caplog):
    """What a training does then: `test_whole_run.py`."""
    caplog.set_level("INFO", logger="align")
    monkeypatch.chdir(tmp_path)
    command = faulty("stoppable", "stoppable")
    monkeypatch.setattr(launch, "launch_command", lambda *_: command)

    def tell() -> None:
        wait_until(lambda: len(list(tmp_path.glob("waiting-*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    config = build_config({"policy": "p", "questions": "q.jsonl", "launch": {"num_processes": 2}}, base=tmp_path)
    with pytest.raises(SystemExit) as exit_:
        launch.run_stage_command(config, "dpo", 1)
    assert exit_.value.code == 0
    assert caplog.messages == ["stopped; the same command resumes from here"]
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]


@pytest.mark.parametrize(
    ("commands", "code", "message"),
    [
        (("bad-key", "bad-key"), 2, ["align.yaml: there is no key 'polcy'; did you mean 'policy'?"]),
        (("fine", "bad-image"), 2, ["process 1: 1.png: not a readable image"]),
    ],
)
def test_under_another_launcher_each_fault_is_said_once_with_its_process(commands, code, message):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.faulty", *commands],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    errors = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(errors) == len(message)
    assert f"exitcode  : {code} " in done.stderr
    # Which of the two was the first cannot be known.
    assert [error.removeprefix("process 1: ") for error in errors] == [
        line.removeprefix("process 1: ") for line in message
    ]
    assert ("process 1: " in "".join(errors)) >= ("process 1: " in "".join(message))
    assert LOST not in done.stderr


def test_an_interrupted_command_says_that_it_goes_on(from_root):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.faulty", "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests may have been started in the background, where the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, message) == (130, "error: interrupted; the same command resumes from here\n")
