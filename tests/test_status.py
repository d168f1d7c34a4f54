"""`align status`: what processes write is what is shown, and what is shown stays true when they are killed."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from align.monitoring.heartbeat import clear_heartbeats, current, heartbeat
from align.monitoring.memory import memory_usage
from align.monitoring.progress import progress
from align.run.folder import RunDir
from align.run.server_addresses import publish, withdraw
from align.status.run_status import RunMonitor, find_run, run_status
from tests.patience import PATIENCE_S
from tests.stage_runs import align, begin_in_two_processes, make_project, write_lines


@pytest.fixture
def this(tmp_path):
    """Round 1 of a run whose sampling has begun."""
    this = RunDir(tmp_path / "run").round(1)
    this.path.mkdir(parents=True)
    this.manifest.begin("sample", settings={}, inputs={})
    return this


def sampled(path, *finish_reasons):
    line = {"responses": [{"text": "a", "finish_reason": reason} for reason in finish_reasons]}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def beat(this, rank, *, own, moved=0.0, alive=0.0, host=None, scope="all", before=2, total=40, label="round 1: sample"):
    """What a process of the rank would have written; times are seconds before now."""
    now = time.time()
    work = {"label": label, "total": total, "before": before, "scope": scope, "parts": None, "own": own, "figures": {}}
    work |= {"started": now - 900, "moved": now - moved, "speed": 0.5}
    memory = {"used": (rank + 1) * 2**30, "peak": (rank + 2) * 2**30, "device": "cuda"}
    data = {"stage": "sample", "started": now - 900, "alive": now - alive, "pid": 1, "host": host, "memory": memory}
    (this.path / f".progress-{rank}.json").write_text(json.dumps(data | {"work": work}))


def sample_a_little(this):
    """Twelve questions of forty, two of them by this process; then something goes wrong."""
    with heartbeat(this.path, "sample"), progress("round 1: sample", total=40, done=10, parts="samples") as advance:
        for _ in range(12):
            sampled(this.path / "samples.part-0.jsonl", "stop", "length")
        advance(2)
        current().write()
        yield run_status(this.path.parent)
        raise OSError("torn")


def test_what_a_process_does_is_shown_while_it_does_it_and_kept_when_it_fails(this):
    with this.lock():
        work = sample_a_little(this)
        status = next(work)
        with pytest.raises(OSError, match="torn"):
            next(work)
    (stage,) = status.stages
    assert stage.state == "running"
    # What counts are the twelve lines in the file.
    assert stage.detail.startswith("12 of 40 (30 %), ")
    assert " left, memory " in stage.detail
    assert status.warnings == ["round 1 sample: 12 responses cut off at the longest length so far"]
    assert status.next_command is None
    (stage,) = run_status(this.path.parent).stages
    assert (stage.state, stage.detail) == ("stopped", "12 of 40 (30 %)")
    clear_heartbeats(this.path)
    assert run_status(this.path.parent).stages[0].detail == "12 questions finished"


def test_servers_are_shown_with_their_machine_while_the_stage_that_started_them_is_at_work(this, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: 1e9)
        publish(this.server_logs / "evaluate.json", "killed", ["http://127.0.0.1:1"])
    with this.lock():
        publish(this.server_logs / "sample.json", "checkpoint-1", ["http://127.0.0.1:5001", "http://127.0.0.1:5002"])
        shown = f"checkpoint-1 on {socket.gethostname()}: http://127.0.0.1:5001, http://127.0.0.1:5002"
        status = run_status(this.path.parent)
        assert status.servers == (shown,)
        assert f"  serving {shown}" in status.text.splitlines()
        withdraw(this.server_logs / "sample.json")
        assert run_status(this.path.parent).servers == ()
        publish(this.server_logs / "sample.json", "checkpoint-1", ["http://127.0.0.1:5001"])
    assert run_status(this.path.parent).servers == ()


def test_processes_are_added_up(this):
    with this.lock():
        beat(this, 0, own=3)
        beat(this, 1, own=5)
        status = run_status(this.path.parent)
    # 2 finished before, 3 and 5 since; half a question a second each; 30 are left.
    assert status.stages[0].detail == (
        "10 of 40 (25 %), 1.0/s, 30 s left, memory 2.00 GiB (peak 3.00 GiB) in the largest process"
    )
    assert "2 processes, " in status.working


def test_steps_that_processes_make_together_count_once(this):
    with this.lock():
        for rank in (0, 1):
            beat(this, rank, own=8, scope="same", label="round 1: dpo")
        assert run_status(this.path.parent).stages[0].detail.startswith("step 10 of 40 (25 %), 0.5/s, 1 min 0 s left")


def test_shares_of_a_work_are_added_up(this):
    with this.lock():
        for rank in (0, 1):
            beat(this, rank, own=8, scope="own", total=20, label="reference log-probabilities")
        found = run_status(this.path.parent).stages[0].detail
    assert found.startswith("reference log-probabilities 20 of 40 (50 %), 1.0/s")


def held(this, pid, host):
    """The round is held for an hour by a process, as it said itself."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600))
    note = {"pid": pid, "host": host, "since": since, "command": "align sample"}
    (this.path / ".holder.json").write_text(json.dumps(note))


@pytest.fixture
def stopped_clock(monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)


def test_silence_and_standstill_are_told(this, stopped_clock):
    held(this, 4711, "elsewhere")
    beat(this, 0, own=3, moved=400)
    beat(this, 1, own=5, moved=500)
    assert run_status(this.path.parent).warnings == [
        "round 1 sample: no progress for 6 min 40 s, where 1.0/s was usual"
    ]
    beat(this, 0, own=3)
    beat(this, 1, own=5, alive=90)
    status = run_status(this.path.parent)
    assert status.stages[0].state == "running"
    assert status.warnings == ["round 1 sample: process 1 has not been heard of for 1 min 30 s"]


def test_a_holder_that_is_gone_has_stopped(this):
    # On another machine it is believed as long as it writes.
    held(this, 4711, "elsewhere")
    beat(this, 0, own=3, alive=90)
    assert run_status(this.path.parent).stages[0].state == "stopped"
    # On this one the process itself is looked for: it may be silent, or its number may be another's by now.
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for pid in (process.pid, os.getpid()):
        held(this, pid, socket.gethostname())
        beat(this, 0, own=3)
        status = run_status(this.path.parent)
        assert (status.stages[0].state, status.working, status.next_command) == ("stopped", "", "align run")
        assert status.stages[0].detail == "5 of 40 (12 %)"


def test_a_growing_file_is_read_on_and_a_torn_line_waits(this):
    part = this.path / "samples.part-0.jsonl"
    watch = RunMonitor(this.path.parent)
    sampled(part, "length", "stop")
    with part.open("a") as file:
        file.write('{"responses": [{"text": "", "finish_reason": "len')
    assert watch.look().warnings == ["round 1 sample: 1 responses cut off at the longest length so far"]
    with part.open("a") as file:
        file.write('gth"}]}\n')
    assert watch.look().warnings == [
        "round 1 sample: 2 responses cut off at the longest length so far",
        "round 1 sample: 1 responses without text so far",
    ]


def test_the_footprint_of_a_process_grows_with_what_it_holds():
    before = memory_usage()
    # Fresh pages of the system's: a large process may have room of its own that it used before.
    with mmap.mmap(-1, 64 * 2**20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        after = memory_usage()
    assert before.device == "cpu"
    assert after.used - before.used > 48 * 2**20
    assert after.peak >= after.used


@pytest.mark.gpu
def test_the_footprint_on_a_gpu_is_what_torch_has_allocated():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    tensor = torch.zeros(64, 2**20, device="cuda")
    found = memory_usage()
    assert found.device == "cuda"
    assert found.used == torch.cuda.memory_allocated() >= tensor.numel() * 4
    assert found.peak == torch.cuda.max_memory_allocated() >= found.used
    assert found.text.startswith(
        f"{found.used / 2**30:.2f} GiB" if found.used >= 2**30 else f"{found.used / 2**20:.1f}"
    )


def test_the_run_is_found_from_the_folder_of_its_configuration(tmp_path, monkeypatch):
    (tmp_path / "align.yaml").write_text("policy: p\nquestions: q.jsonl\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    assert find_run(None) == tmp_path / "runs" / "mine"
    assert find_run(tmp_path) == tmp_path / "runs" / "mine"
    (tmp_path / "runs/mine/round-1").mkdir(parents=True)
    assert find_run(tmp_path / "runs/mine") == tmp_path / "runs/mine"


def wait_for(look, reached, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not reached(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
    return seen


def test_a_stage_in_two_processes_is_followed_killed_and_finished(tmp_path):
    """Half-way both are killed, and the number that is shown is that of the lines in the files."""
    folder = make_project(tmp_path / "project")
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    many = [q | {"id": f"{q['id']}-{n}", "question": f"{n}: {q['question']}"} for n in range(150) for q in questions]
    write_lines(folder / "questions.jsonl", many)
    run = folder / "runs/run"
    launch = begin_in_two_processes(folder, "sample")

    def look():
        return run_status(run) if any(run.glob("round-1/.progress-*.json")) else None

    seen = wait_for(
        look, lambda status: status is not None and " of 600 (" in status.stages[0].detail and "/s" in status.text
    )
    launch.kill()
    assert "2 processes, " in seen.working
    assert "memory" in seen.stages[0].detail
    finished = sum(part.read_bytes().count(b"\n") for part in (run / "round-1").glob("samples.part-*.jsonl"))
    (stage,) = wait_for(look, lambda status: not status.working).stages
    assert stage.state == "stopped"
    assert stage.detail == f"{finished} of 600 ({finished // 6} %)"
    assert 0 < finished < 600
    shown = align(folder, "status")
    assert shown.returncode == 0, shown.stderr
    assert f"round 1  sample    stopped   {finished} of 600" in shown.stdout
    assert "next: align run" in shown.stdout


def test_what_was_counted_is_not_read_again(this):
    part = this.path / "samples.part-0.jsonl"
    for _ in range(3):
        sampled(part, "length", "stop")
    monitor = RunMonitor(this.path.parent)
    assert monitor.look().stages[0].detail == "3 questions finished"
    # Overwritten in place with as many bytes: only what comes after it would be seen.
    part.write_bytes(b"x" * (part.stat().st_size - 1) + b"\n")
    sampled(part, "length", "length")
    seen = monitor.look()
    assert seen.stages[0].detail == "4 questions finished"
    assert seen.warnings == ["round 1 sample: 5 responses cut off at the longest length so far"]


def test_a_damaged_line_of_a_part_counts_as_a_line_and_ends_nothing(this):
    part = this.path / "samples.part-0.jsonl"
    part.write_text("no json\n[1]\n")
    sampled(part, "length")
    status = run_status(this.path.parent)
    assert status.stages[0].detail == "3 questions finished"
    assert status.warnings == ["round 1 sample: 1 responses cut off at the longest length so far"]


def test_an_output_that_is_gone_is_a_warning_with_the_command_that_makes_it_again(this):
    this.samples.write_text("{}\n")
    this.manifest.finish("sample", outputs=[this.samples], counts={"questions": 1})
    assert run_status(this.path.parent).warnings == []
    this.samples.unlink()
    (warning,) = run_status(this.path.parent).warnings
    assert "samples.jsonl not there any more" in warning
    assert warning.endswith("align sample --round 1 --redo")


# A shell starts what runs in the background with SIGINT ignored.
AS_IN_A_TERMINAL = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from align.cli import main; main()"
)


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_watching_ends_without_a_word_about_going_on(this, signal_name):
    process = subprocess.Popen(
        [sys.executable, "-c", AS_IN_A_TERMINAL, "status", str(this.path.parent), "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "round 1  sample" in process.stdout.readline() + process.stdout.readline()
    process.send_signal(getattr(signal, signal_name))
    out, err = process.communicate()
    assert "resumes" not in out + err
    assert "Traceback" not in err
    assert process.returncode == (130 if signal_name == "SIGINT" else -signal.SIGTERM)
