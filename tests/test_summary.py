"""Tables of held-out numbers on a terminal and in the model card."""

import json

import pytest

from align.config import build_config
from align.evaluation.compare import compare_runs, print_comparison
from align.evaluation.table import print_table
from align.hub.model_card import write_model_card
from align.records import Evaluated, Evaluation, Question, ResponseLogProbs, write_jsonl
from align.run.folder import RunDir


def interval(mean, width=0.1):
    return {"mean": mean, "low": mean - width, "high": mean + width, "count": 4}


def evaluated(path, right, nats=()):
    """A run whose round 1 answered questions so; `nats` are log-probabilities above the first policy's."""
    this = RunDir(path).round(1)
    this.path.mkdir(parents=True)
    answers = [Evaluated(text="x", num_tokens=2, correct=flag) for flag in right]
    lines = [
        Evaluation(id=f"q{i}", question=Question(id=f"q{i}", question="?", answer="x"), greedy=one, sampled=[one])
        for i, one in enumerate(answers)
    ]
    write_jsonl(this.evaluation_lines, lines)
    metrics = {"sampled_accuracy": interval(sum(right) / len(right)), "response_tokens": interval(2.0)}
    if nats:
        for file, values in ((this.own_log_probs, nats), (this.first_log_probs, [0.0] * len(nats))):
            records = [ResponseLogProbs(id=f"q{i}", log_probs=[v], num_tokens=[2]) for i, v in enumerate(values)]
            write_jsonl(file, records)
        metrics["kl"] = interval(sum(nats) / len(nats))
    this.evaluation.write_text(json.dumps({"round": 1, "questions": 40, "metrics": metrics}))
    return path


def test_runs_stand_side_by_side_with_what_can_be_told_of_their_difference(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    one = evaluated(tmp_path / "one", [False] * 4, [1.0, 2.0, 3.0, 4.0])
    other = evaluated(tmp_path / "other", [True] * 4, [2.0, 3.0, 4.0, 2.5])
    found = compare_runs(one, other)
    # Differences of 1, 1, 1 and -1.5 nats.
    assert found["kl"].mean == pytest.approx(0.375)
    assert found["kl"].count == 4
    print_comparison(one, other)
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["sampled", "accuracy,", "%", "0.0", "100.0", "+100.0"] in rows
    assert ["KL", "from", "first,", "nats", "2.50", "2.88", "+0.38,", "unclear"] in rows
    assert max(map(len, text.splitlines())) <= 80


def test_runs_without_a_measured_distance_are_compared_by_the_rest(tmp_path):
    one, other = evaluated(tmp_path / "one", [True] * 4), evaluated(tmp_path / "other", [True] * 4, [1.0] * 4)
    assert set(compare_runs(one, other)) == {"greedy_accuracy", "sampled_accuracy", "response_tokens"}


def test_the_table_of_three_rounds_fits_a_terminal_of_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("sampled_accuracy", "greedy_accuracy", "win_rate_initial", "win_rate_parent", "hallucination", "kl")
    for number in range(4):
        this = RunDir(tmp_path).round(number)
        this.path.mkdir()
        this.evaluation.write_text(
            json.dumps({"round": 1, "questions": 40, "metrics": {name: interval(0.455, 0.111) for name in names}})
        )
    print_table({"run": tmp_path})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    shown = [line.split() for line in lines]
    assert ["wins", "over", "parent,", "%", *["45.5"] * 4] in shown
    assert [cell for _ in range(4) for cell in ("[34.4,", "56.6]")] in shown


def test_the_card_has_results_and_cost_up_to_its_round(tmp_path):
    (tmp_path / "policy").mkdir()
    config = build_config({"name": "run", "policy": "./policy", "questions": "q.jsonl"}, base=tmp_path)
    evaluated(config.run_dir, [True] * 4, [1.5] * 4)
    this = RunDir(config.run_dir).round(1)
    this.checkpoint.mkdir()
    gpu = {"device": "cuda (H100)", "num_processes": 8, "gpu_seconds": 14_400.0, "cpu_seconds": 360.0}
    notes = {"kl": "both policies at temperature 0.7, on the checkpoint's own samples"}
    for stage, seconds, tokens in (("dpo", 1800.0, 5000), ("evaluate", 60.0, 70)):
        this.manifest.begin(stage, settings={}, inputs={})
        cost = gpu | {"tokens_read": tokens, "tokens_written": 0}
        this.manifest.finish(stage, outputs=[], counts={}, seconds=seconds, cost=cost, notes=notes)
    later = RunDir(config.run_dir).round(2)
    later.path.mkdir()
    later.manifest.begin("sample", settings={}, inputs={})
    later.manifest.finish("sample", outputs=[], counts={}, seconds=9.0, cost=gpu)
    card = write_model_card(config, 1).read_text()
    assert "| 1 | 4 | 100.0 [90.0, 110.0] | 2.0 [1.9, 2.1] | 1.50 [1.40, 1.60] |" in card
    assert "KL divergence from the first policy: both policies at temperature 0.7" in card
    assert "| 1 | dpo | 30 min 0 s | 5,000 | 0 | 4.000 | 0.100 | 8 x cuda (H100) |" in card
    assert "| | all | 31 min 0 s | 5,070 | 0 | 8.000 | 0.200 | |" in card
    assert "| 2 | sample" not in card
