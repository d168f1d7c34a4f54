"""What a run cost, as its manifests say, and how far it moved from the first policy, as the report shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.report import write_report
from align.report.funnel import costs
from align.report.read import read_run
from tests.report.fake_run import FakeRun
from tests.report.test_report import read

COST = {"device": "cuda (H100)", "num_processes": 8, "gpu_seconds": 28_800.0, "cpu_seconds": 900.0}


@pytest.fixture
def run(tmp_path) -> Path:
    FakeRun(tmp_path / "run").build()
    return tmp_path / "run"


def change(run: Path, number: int, stage: str, **entries: object) -> None:
    path = run / f"round-{number}" / "manifest.json"
    data = json.loads(path.read_text())
    data["stages"][stage] |= entries
    path.write_text(json.dumps(data))


def test_gpu_hours_are_those_of_all_processes_and_a_stage_on_a_cpu_has_none(run):
    change(run, 1, "dpo", seconds=3600.0, cost=COST | {"tokens_read": 5_000_000, "tokens_written": 0})
    on_cpu = {"device": "cpu", "num_processes": 1, "gpu_seconds": 0.0, "cpu_seconds": 7200.0}
    change(run, 1, "score", seconds=3600.0, cost=on_cpu | {"tokens_read": 1234, "tokens_written": 56})
    found = {(cost.number, cost.stage): cost for cost in costs(read_run(run))}
    training, scoring, unknown = found[1, "dpo"], found[1, "score"], found[2, "dpo"]
    assert (training.gpu_hours, training.cpu_hours, training.device) == (8.0, 0.25, "8 x cuda (H100)")
    assert (scoring.gpu_hours, scoring.cpu_hours, scoring.device) == (0.0, 2.0, "cpu")
    assert (scoring.tokens_read, scoring.tokens_written) == (1234, 56)
    assert (unknown.gpu_hours, unknown.cpu_hours) == (None, None)
    text = read(write_report(run)).text
    assert "8.00 GPU hours" in text
    assert "1 dpo 1 h 0 min 5,000,000 0 1,389 8.00 0.25 8 x cuda (H100)" in text
    assert "1 score 1 h 0 min 1,234 56 0 0 2.00 cpu" in text


def test_a_run_on_a_cpu_has_cpu_hours(run):
    entry = {"device": "cpu", "num_processes": 1, "gpu_seconds": 0.0, "cpu_seconds": 5400.0}
    change(run, 1, "dpo", cost=entry)
    assert ", 0 GPU hours, 1.50 CPU hours;" in read(write_report(run)).text


def test_what_servers_spent_is_said_to_be_missing(run):
    change(run, 1, "sample", cost=COST, notes={"servers": "http://a (policy): 3 answers"})
    text = read(write_report(run)).text
    assert "What servers spent is not among the hours." in text
    assert "8 x cuda (H100), and servers" in text


def test_the_distance_from_the_first_policy_has_its_curves(run):
    for number, nats in ((1, 2.5), (2, 4.25), (3, 6.125)):
        path = run / f"round-{number}" / "evaluation.json"
        data = json.loads(path.read_text())
        data["metrics"]["kl"] = {"mean": nats, "low": nats - 0.5, "high": nats + 0.5, "count": 40}
        data["metrics"]["kl_per_token"] = {"mean": nats / 50, "low": nats / 60, "high": nats / 40, "count": 40}
        path.write_text(json.dumps(data))
    text = read(write_report(run)).text
    assert "Distance from the first policy" in text
    for shown in ("2.50", "2.00 to 3.00", "4.25", "0.050", "0.102 to 0.153"):
        assert shown in text
    assert "left out" not in text


def test_a_distance_that_could_not_be_measured_is_said(run):
    change(run, 1, "evaluate", notes={"kl": "left out: servers give no log-probabilities"})
    assert (
        "Distance from the first policy (KL): left out: servers give no log-probabilities."
        in read(write_report(run)).text
    )
