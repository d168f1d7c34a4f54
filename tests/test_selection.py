"""Which round a run results in: chosen on questions that no reported number comes from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from align.check.preflight import run_preflight
from align.config import build_config
from align.dpo.train import run_dpo
from align.errors import UserError
from align.evaluation.against_parent import worse_than_parent
from align.evaluation.compare import compare_runs
from align.evaluation.decide import decide, decide_again
from align.evaluation.evaluate import run_evaluate
from align.evaluation.gates import check_gates
from align.evaluation.split import deciding_questions, split_of
from align.evaluation.summary import read_summary
from align.evaluation.table import print_table
from align.hub.model_card import write_model_card
from align.loop import _standing
from align.media.images import ImageStore
from align.records import Compared, Evaluated, Evaluation, Question, read_jsonl, write_jsonl
from align.report import write_report
from align.report.changes import history
from align.report.read import read_run
from align.report.verdict import judge
from align.report.warnings import find_warnings
from align.run.folder import RunDir
from align.run.outdated import outdated_rounds
from align.run.parents import parent_of, starts_from
from align.status.run_status import run_status
from tests.dpo.conftest import make_pairs
from tests.dpo.test_train import make_run

QUESTIONS = [Question(id=f"q{n}", question="What?", images=[f"{n // 2}.png"], answer="x") for n in range(120)]
DECIDING = deciding_questions(QUESTIONS, 0.5)


def test_questions_about_one_image_stay_together_wherever_they_stand():
    sides = {n: {question.id in DECIDING for question in QUESTIONS[2 * n : 2 * n + 2]} for n in range(60)}
    assert all(len(side) == 1 for side in sides.values())
    assert 40 < len(DECIDING) < 80
    assert deciding_questions(QUESTIONS[::-1], 0.5) == DECIDING
    assert deciding_questions(QUESTIONS[:50], 0.5) == DECIDING & {question.id for question in QUESTIONS[:50]}
    assert deciding_questions(QUESTIONS, 0.2) < DECIDING
    # One that shows two images holds their questions together.
    linked = [*QUESTIONS, *(Question(id=f"l{n}", question="?", images=[f"{n}.png", f"{n + 1}.png"]) for n in range(59))]
    assert deciding_questions(linked, 0.5) == set()
    few = deciding_questions(QUESTIONS[:4], 1e-9)
    assert len(few) == 2, "at least one image, and not all"


def test_a_picture_decides_under_each_of_its_names_or_under_none(tmp_path):
    images = ImageStore(tmp_path)
    for n in range(40):
        (tmp_path / f"{n}.png").write_bytes(b"picture %d" % n)
        (tmp_path / f"copy of {n}.png").write_bytes(b"picture %d" % n)
    both = [
        Question(id=f"{name}{n}", question="?", images=[f"{name}{n}.png"])
        for n in range(40)
        for name in ("", "copy of ")
    ]
    deciding = deciding_questions(both, 0.5, images)
    assert all((f"{n}" in deciding) == (f"copy of {n}" in deciding) for n in range(40))
    assert 20 < len(deciding) < 60
    with pytest.raises(UserError, match="all of them are about one image"):
        split_of(config_of(tmp_path, select="best", image_root="."), both[:2])
    # Whatever it is called, it decides where it decided.
    assert deciding_questions(both[1::2], 0.5, images) == deciding & {question.id for question in both[1::2]}
    # Those that cannot be read go by their names, as many as there are.
    assert deciding_questions([*both, *QUESTIONS[100:]], 0.5, images) > deciding


def config_of(folder, **evaluate):
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "held-out.jsonl", QUESTIONS)
    values = {"policy": "first", "questions": "q.jsonl", "evaluate": {"questions": "held-out.jsonl"} | evaluate}
    return build_config({"rounds": 3} | values, base=folder)


def weights_of(run, number):
    return run.round(number).manifest.stage("dpo").outputs["checkpoint"] if number else "the first policy's weights"


def answered(config, number, *, deciding, reported, parent=None, preferred=None):
    """A trained round that answers this share of the deciding and of the reported questions rightly, and is evaluated."""
    run = RunDir(config.run_dir)
    this = run.round(number)
    this.path.mkdir(parents=True, exist_ok=True)
    manifest = this.manifest
    if number:
        this.checkpoint.mkdir()
        (this.checkpoint / "config.json").write_text(json.dumps({"round": number}))
        made_from = weights_of(run, number - 1 if parent is None else parent)
        for stage, outputs in (("sample", []), ("dpo", [this.checkpoint])):
            manifest.begin(stage, settings={}, inputs={"policy": made_from})
            manifest.finish(stage, outputs=outputs, counts={})
    lines = []
    for side, share in ((True, deciding), (False, reported)):
        members = [question for question in QUESTIONS if (question.id in DECIDING) is side]
        for place, question in enumerate(members):
            answer = Evaluated(text="x", num_tokens=1, correct=place < share * len(members))
            lines.append(Evaluation(id=question.id, question=question, greedy=answer, sampled=[answer]))
    write_jsonl(this.evaluation_lines, lines)
    if preferred is not None:
        write_jsonl(
            this.comparisons, [Compared(id=line.id, preferred={"initial": preferred(line.id)}) for line in lines]
        )
    manifest.begin("evaluate", settings={}, inputs={"checkpoint": weights_of(run, number)})
    decided = decide(config, run, number, split_of(config, QUESTIONS))
    outputs = [this.evaluation, this.evaluation_lines]
    manifest.finish(
        "evaluate", outputs=outputs, counts={"questions": 120} | decided.counts, notes=decided.notes, **decided.facts
    )
    return this


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Round 1 is the best by the questions that decide; round 2 is better only by those that are reported."""
    config = config_of(tmp_path_factory.mktemp("chosen"), select="best", patience=2)
    answered(config, 0, deciding=0.2, reported=0.2)
    answered(config, 1, deciding=0.7, reported=0.5)
    answered(config, 2, deciding=0.4, reported=0.9)
    answered(config, 3, deciding=0.5, reported=0.6, parent=1)
    return config


def test_the_best_round_is_chosen_by_some_questions_and_reported_by_the_others(chosen):
    run = RunDir(chosen.run_dir)
    summary = read_summary(run.round(2).evaluation)
    assert summary.deciding_questions == DECIDING
    assert summary.questions == 120 - len(DECIDING)
    assert summary.metrics["sampled_accuracy"].mean == pytest.approx(0.9, abs=0.02)
    assert summary.metrics["sampled_accuracy"].count == 120 - len(DECIDING)
    assert summary.deciding_metrics["sampled_accuracy"].mean == pytest.approx(0.4, abs=0.02)
    selected = run.round(2).manifest.stage("evaluate").selected
    assert (selected.round, selected.checkpoint) == (1, weights_of(run, 1))
    assert selected.why.startswith(
        f"round 1, by sampled accuracy on {len(DECIDING)} held-out questions set apart for that: "
    )
    assert [starts_from(chosen, run, number) for number in (1, 2, 3)] == [0, 1, 1]
    assert [parent_of(run, number) for number in (1, 2, 3)] == [0, 1, 1]
    assert outdated_rounds(run.rounds()) == {}
    standing = _standing(chosen, 1)
    assert (standing.result, standing.stopped_by) == (1, "")
    standing = _standing(chosen, 3)
    assert (standing.result, standing.stopped_by) == (1, "evaluate.patience")


def test_gates_and_stopping_go_by_the_questions_that_decide_and_words_by_the_others(chosen):
    run = RunDir(chosen.run_dir)
    check_gates(run.round(2), {"max_sampled_accuracy": 0.5})
    with pytest.raises(UserError, match=rf"sampled_accuracy is 0.4\d* \({len(DECIDING)} held-out questions\)"):
        check_gates(run.round(2), {"min_sampled_accuracy": 0.8})
    assert "set apart for decisions: right answers -3" in worse_than_parent(run, 2, deciding=True)
    assert worse_than_parent(run, 2) is None
    stopping = config_of(chosen.run_root.parent, stop_if_worse=True)
    standing = _standing(stopping, 2)
    assert (standing.result, standing.stopped_by) == (1, "evaluate.stop_if_worse")


def test_what_was_chosen_and_why_stands_in_table_card_report_and_status(chosen, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    run = RunDir(chosen.run_dir)
    print_table({"run": run.path})
    shown = capsys.readouterr().out
    why = run.round(3).manifest.stage("evaluate").selected.why
    assert f"{len(DECIDING)} others, which decide (gates, stopping, selection), are not in these numbers" in shown
    assert f"Chosen: {why}." in shown
    card = write_model_card(chosen, 3).read_text()
    assert f"Best of the rounds up to this one: {why}." in card
    lineage = [line.split("|")[1].strip() for line in card.splitlines() if line.count("|") == 6 and "`" in line]
    assert lineage == ["1", "3"], "round 3 was made from round 1"
    data = read_run(run.path)
    assert [line.id for line in data.rounds[3].lines if line.id in DECIDING] == []
    moved = history(data).overall["sampled_accuracy"]
    assert (moved.first_round, moved.last_round, moved.paired) == (0, 1, True)
    assert [(step.first_round, step.last_round) for step in history(data).steps["sampled_accuracy"]] == [
        (0, 1),
        (1, 2),
        (1, 3),
    ]
    found = judge(data, history(data), None, {})
    assert found.title == "Better: right answers rose from 20.8\u00a0% to 50.0\u00a0%."
    assert why in found.detail
    assert "None of the" in found.detail
    assert why in write_report(run.path).read_text()
    assert f"best so far: {why}" in run_status(run.path).text


def test_two_runs_are_compared_by_what_chose_in_neither(chosen, tmp_path):
    other = config_of(tmp_path / "other")
    answered(other, 1, deciding=1.0, reported=0.9)
    found = compare_runs(chosen.run_dir, other.run_dir)["sampled_accuracy"]
    assert found.count == 120 - len(DECIDING)
    # Of the run that has chosen, the round that it results in.
    assert found.mean == pytest.approx(0.4, abs=0.02)


def test_other_gates_divide_an_evaluated_round_anew_and_no_answer_is_asked_again(tmp_path):
    config = config_of(tmp_path)
    half = lambda id_: float(id_ in DECIDING)  # noqa: E731
    answered(config, 0, deciding=0.2, reported=0.2)
    this = answered(config, 1, deciding=0.4, reported=0.8, preferred=half)
    whole = read_summary(this.evaluation)
    assert whole.decision is None
    assert whole.metrics["win_rate_initial"].mean == pytest.approx(len(DECIDING) / 120)
    gated = config_of(tmp_path, gates={"min_sampled_accuracy": 0.5})
    run = RunDir(config.run_dir)
    decide_again(gated, run, 1, split_of(gated, QUESTIONS))
    summary = read_summary(this.evaluation)
    assert (summary.metrics["win_rate_initial"].mean, summary.deciding_metrics["win_rate_initial"].mean) == (0, 1)
    entry = this.manifest.stage("evaluate")
    this.manifest.check_unaltered("evaluate")
    assert entry.counts == {
        "questions": 120,
        "deciding_questions": len(DECIDING),
        "reported_questions": summary.questions,
    }
    before = this.manifest_path.stat().st_mtime_ns
    decide_again(gated, run, 1, split_of(gated, QUESTIONS))
    assert this.manifest_path.stat().st_mtime_ns == before
    decide_again(config, run, 1, None)
    assert read_summary(this.evaluation) == whole
    assert this.manifest.stage("evaluate").counts == {"questions": 120}
    this.comparisons.unlink()
    with pytest.raises(UserError, match="kept no verdicts of the critic"):
        decide_again(gated, run, 1, split_of(gated, QUESTIONS))


def test_a_round_that_was_not_held_against_the_others_starts_nothing(tmp_path):
    config = config_of(tmp_path)
    answered(config, 1, deciding=0.4, reported=0.4)
    best = config_of(tmp_path, select="best")
    run = RunDir(config.run_dir)
    with pytest.raises(UserError, match=r"not known which round is the best so far.*align evaluate --round 1"):
        starts_from(best, run, 2)
    decide_again(best, run, 1, split_of(best, QUESTIONS))
    assert starts_from(best, run, 2) == 1
    with pytest.raises(UserError, match="not known which round"):
        starts_from(config_of(tmp_path, select="best", select_metric="greedy_accuracy"), run, 2)
    assert starts_from(config, run, 2) == 1


def test_a_run_may_result_in_the_first_policy(tmp_path):
    config = config_of(tmp_path, select="best")
    answered(config, 0, deciding=0.6, reported=0.6)
    answered(config, 1, deciding=0.3, reported=0.9)
    assert _standing(config, 1).result == 0
    assert starts_from(config, RunDir(config.run_dir), 2) == 0
    data = read_run(config.run_dir)
    found = judge(data, history(data), None, {})
    assert (found.state, found.title) == ("neutral", "No round was chosen: the run results in the first policy.")


def test_parts_that_are_too_small_are_said_and_decide_nothing(tmp_path):
    config = config_of(tmp_path, select="best", stop_if_worse=True, decision_share=0.05)
    num_deciding = len(split_of(config, QUESTIONS))
    assert num_deciding < 20
    answered(config, 0, deciding=1.0, reported=1.0)
    this = answered(config, 1, deciding=0.0, reported=0.0)
    assert f"; {num_deciding} are too few (below 20)" in this.manifest.stage("evaluate").notes["held-out questions"]
    assert "too few (below 20) to tell rounds apart" in this.manifest.stage("evaluate").selected.why
    assert worse_than_parent(RunDir(config.run_dir), 1, deciding=True) is None
    data = read_run(config.run_dir)
    assert "Too few held-out questions in a part" in {warned.title for warned in find_warnings(data, history(data), {})}


def test_settings_that_cannot_choose_are_refused(tmp_path):
    for alone in ({"select": "best"}, {"stop_if_worse": True}, {"gates": {"max_hallucination": 0.1}}):
        with pytest.raises(UserError, match=r"needs held-out questions to decide by \(evaluate.questions\)"):
            build_config({"policy": "p", "questions": "q.jsonl", "evaluate": alone}, base=tmp_path)
    with pytest.raises(UserError, match=r"evaluate.patience: needs evaluate.select: best"):
        config_of(tmp_path, patience=1)
    config = config_of(tmp_path, select="best", select_metric="hallucination")
    assert "nothing to choose a round by: no hallucination can be measured" in run_preflight(config).text()
    with pytest.raises(UserError, match="there is only one"):
        split_of(config, QUESTIONS[:1])
    with pytest.raises(UserError, match="all of them are about one image"):
        split_of(config, QUESTIONS[:2])


def test_a_run_that_overfits_keeps_its_best_round_and_goes_on_from_there(tmp_path):
    """Round 1 is taken as what is right; a huge learning rate ruins round 2; round 3 starts from round 1 again."""

    def run_of(name, learning_rate=1e-3, policy="policy"):
        held_out = {"questions": "held-out.jsonl", "max_new_tokens": 4, "image_dependence": 0, "kl": False}
        held_out |= {"select": "best", "select_metric": "greedy_accuracy", "image_root": "."}
        dpo = {"learning_rate": learning_rate, "num_train_epochs": 1, "warmup_steps": 0}
        return make_run(tmp_path, num_pairs=4, name=name, policy=policy, dpo=dpo, evaluate=held_out)

    questions = [Question(id=f"q{n}", question=f"What is {n}?", answer="?") for n in range(44)]
    write_jsonl(tmp_path / "held-out.jsonl", questions)
    (tmp_path / "questions.jsonl").write_text('{"id": "t", "question": "Trained on?"}\n')
    config = run_of("run")
    run = RunDir(config.run_dir)
    run_dpo(config, 1)
    probe = run_of("probe", policy=str(run.round(1).checkpoint))
    run_evaluate(probe, 0)
    texts = {
        line.id: line.greedy.text for line in read_jsonl(RunDir(probe.run_dir).round(0).evaluation_lines, Evaluation)
    }
    right = [question.model_copy(update={"answer": texts[question.id]}) for question in questions]
    write_jsonl(tmp_path / "held-out.jsonl", right)
    run_evaluate(config, 0)
    run_evaluate(config, 1)
    write_jsonl_pairs(run, 2, tmp_path)
    run_dpo(run_of("run", learning_rate=1.0), 2)
    run_evaluate(config, 2)
    selected = run.round(2).manifest.stage("evaluate").selected
    assert selected.round == 1, selected.why
    summaries = [read_summary(run.round(number).evaluation) for number in range(3)]
    deciding = split_of(config, right)
    assert all(summary.deciding_questions == deciding for summary in summaries)
    reported = [summary.metrics["greedy_accuracy"] for summary in summaries]
    assert {found.count for found in reported} == {44 - len(deciding)}
    assert reported[1].mean == 1 > reported[2].mean
    write_jsonl_pairs(run, 3, tmp_path)
    run_dpo(config, 3)
    assert json.loads(run.round(3).manifest_path.read_text())["stages"]["dpo"]["parent"] == str(run.round(1).checkpoint)
    again, one = (load_file(run.round(number).checkpoint / "model.safetensors") for number in (3, 1))
    apart = max(float((again[name] - one[name]).abs().max()) for name in one)
    assert 0 < apart < 0.1, "trained from round 1 and not from the ruined round 2"
    assert torch.isfinite(torch.tensor(apart))


def write_jsonl_pairs(run, number, folder):
    run.round(number).path.mkdir()
    write_jsonl(run.round(number).pairs, make_pairs(folder / "images", 4))
