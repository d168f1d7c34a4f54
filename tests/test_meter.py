"""What a stage costs: counted while it runs, kept when it is interrupted, added up over processes."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from align.accelerator import name_in_use
from align.monitoring.cost import cost_counter, cost_of, count_tokens
from align.run.folder import RunDir


def test_what_was_spent_before_an_interruption_counts(tmp_path):
    began = time.monotonic()

    def interrupted():
        with cost_counter(tmp_path, "sample"):
            count_tokens(read=100, written=7)
            time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with cost_counter(tmp_path, "sample"):
        count_tokens(read=20)
        time.sleep(0.02)
        found = cost_of(tmp_path, "sample")
    assert (found["tokens_read"], found["tokens_written"]) == (120, 7)
    assert 0.068 <= found["seconds"] <= time.monotonic() - began + 0.01  # rounded
    assert (found["device"], found["num_processes"], found["gpu_seconds"]) == ("cpu", 1, 0.0)


def test_stages_are_counted_apart_and_tokens_of_earlier_stages_are_not_theirs(tmp_path):
    for stage, tokens in (("sample", 5), ("score", 9)):
        with cost_counter(tmp_path, stage):
            count_tokens(written=tokens)
    assert cost_of(tmp_path, "sample")["tokens_written"] == 5
    assert cost_of(tmp_path, "score")["tokens_written"] == 9


def test_gpu_seconds_and_tokens_are_added_over_processes_and_the_time_is_the_main_ones(tmp_path):
    for rank in range(3):
        entry = {"rank": rank, "device": "cuda (H100)", "seconds": 10.0 - rank, "gpu_seconds": 10.0, "tokens_read": 4}
        (tmp_path / f".spent-dpo-{rank}.json").write_text(json.dumps(entry))
    found = cost_of(tmp_path, "dpo")
    assert (found["device"], found["seconds"], found["gpu_seconds"], found["tokens_read"]) == (
        "cuda (H100)",
        10.0,
        30.0,
        12,
    )


def test_a_killed_process_has_left_its_last_beat(tmp_path):
    code = (
        "import time, sys; from pathlib import Path; from align.monitoring import cost as meter; meter.EVERY_S = 0.02\n"
        "with meter.cost_counter(Path(sys.argv[1]), 'score'): meter.count_tokens(read=3); time.sleep(3600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / ".spent-score-0.json"
    while not path.exists() or json.loads(path.read_text())["tokens_read"] == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = cost_of(tmp_path, "score")
    assert before["seconds"] > 0
    with cost_counter(tmp_path, "score"):
        time.sleep(0.02)
        assert cost_of(tmp_path, "score")["seconds"] >= before["seconds"] + 0.018


def test_the_manifest_keeps_the_cost_of_all_attempts_and_redo_begins_anew(tmp_path):
    this = RunDir(tmp_path).round(1)
    this.path.mkdir()
    for _ in range(2):
        with cost_counter(this.path, "sample"):
            this.manifest.begin("sample", settings={}, inputs={})
            count_tokens(written=5)
    with cost_counter(this.path, "sample"):
        this.manifest.finish("sample", outputs=[], counts={})
    entry = this.manifest.stage("sample")
    assert entry.cost["tokens_written"] == 10
    assert entry.seconds > 0
    this.discard("sample")
    assert cost_of(this.path, "sample") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_process_that_uses_a_gpu_says_so_and_its_seconds_are_gpu_seconds(tmp_path):
    with cost_counter(tmp_path, "evaluate"):
        torch.zeros(1, device="cuda")
        time.sleep(0.05)
    assert name_in_use().startswith("cuda (")
    assert cost_of(tmp_path, "evaluate")["gpu_seconds"] >= 0.05


@pytest.mark.parametrize("damage", ["", "[1]", "\xff\x00", '{"seconds": {"a": 1}}', '{"seconds": NaN, "rank": "x"}'])
def test_a_damaged_file_of_costs_costs_its_figures_and_nothing_else(tmp_path, damage):
    (tmp_path / ".spent-sample-0.json").write_bytes(damage.encode("latin-1"))
    with cost_counter(tmp_path, "sample"):
        count_tokens(read=5)
    found = cost_of(tmp_path, "sample")
    assert found["tokens_read"] == 5
    assert found["seconds"] >= 0
