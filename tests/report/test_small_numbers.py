"""Of few questions nothing is claimed: intervals that hold, counts beside figures,
no verdict below a stated minimum."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from align.report import write_report
from align.report.changes import MIN_QUESTIONS, history
from align.report.read import RoundData, RunData, Stage, read_run
from align.report.verdict import judge
from align.report.warnings import find_warnings
from align.run.folder import Round
from align.statistics import bootstrap_share
from reward.intervals import Interval
from tests.report.fake_run import FakeRun


def rounds(count: int) -> RunData:
    found = []
    for number, mean in enumerate((0.1, 0.9)):
        data = RoundData(number, Round(Path(f"nowhere/round-{number}"), number))
        data.metrics = {"greedy_accuracy": Interval(mean, mean - 0.05, mean + 0.05, count)}
        found.append(data)
    return RunData("run", Path("nowhere"), rounds=found)


@pytest.mark.parametrize(("count", "state"), [(MIN_QUESTIONS - 1, "unclear"), (MIN_QUESTIONS, "better")])
def test_no_verdict_below_the_stated_minimum_of_questions(count, state):
    run = rounds(count)
    found = judge(run, history(run), None, {})
    assert found.state == state
    few = (
        found.title
        == "Too few held-out questions for a verdict: right when greedy 10.0\u00a0% before, 90.0\u00a0% after."
    )
    assert few == (state == "unclear")
    assert few == ("Below 20 held-out questions nothing is called better or worse." in found.detail)


@pytest.mark.parametrize(("pairs", "said"), [(2, False), (19, False), (20, True)])
def test_what_training_made_of_few_pairs_says_nothing(pairs, said):
    data = RoundData(1, Round(Path("nowhere/round-1"), 1))
    data.log = [{"step": 1.0, "rewards/chosen": -2.0, "rewards/margins": 0.01, "rewards/accuracies": 0.5}]
    data.stages["dpo"] = Stage("dpo", "complete", counts={"pairs": pairs})
    run = RunData("run", Path("nowhere"), rounds=[data])
    titles = {warned.title for warned in find_warnings(run, history(run), {})}
    assert ("The pairs taught hardly anything" in titles) is said
    diagnoses = judge(run, history(run), None, {}).diagnoses
    assert bool(diagnoses) is said


def test_none_of_seven_and_no_change_of_seven_have_intervals_with_a_width(tmp_path):
    run = FakeRun(tmp_path / "runs" / "mine", skill=(0.5, 0.5), num_held_out=7, num_training=3).build()
    for number in (0, 1):
        path = run / f"round-{number}"
        lines = [json.loads(line) for line in (path / "evaluation.jsonl").read_text().splitlines()]
        for line in lines:
            line["greedy"]["correct"] = False
        (path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        numbers = json.loads((path / "evaluation.json").read_text())
        numbers["metrics"] = {"greedy_accuracy": asdict(bootstrap_share([0.0] * 7))}
        (path / "evaluation.json").write_text(json.dumps(numbers))
    data = read_run(run)
    # Wilson, 0 of 7: z^2 / (n + z^2) = 3.8415 / 10.8415.
    assert data.rounds[0].metrics["greedy_accuracy"].high == pytest.approx(0.3543, abs=1e-4)
    moved = history(data).overall["greedy_accuracy"]
    assert moved.paired
    assert (moved.difference.low, moved.difference.high) == pytest.approx((-0.3543, 0.3543), abs=1e-4)
    page = write_report(run).read_text()
    assert "7 questions" in page
    assert "<td>0.0\u00a0%<small>0.0\u00a0% to 35.4\u00a0%</small><small>7 questions</small></td>" in page
