"""One record that cannot be used is left out and counted; what has changed is done again, and the rest stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align import UserError, load_config, run_stage
from align.models.record_faults import CANNOT_READ
from align.records import Question, Samples, parse_line, read_jsonl
from align.run.folder import Round, RunDir
from reward.judgement import Judgement
from tests.stage_runs import make_project, write_lines

CRITIC = {
    "kind": "pairwise",
    "model": "./critic",
    "prompt": "pairwise_short",
    "options": {"soft": True},
    "reliability_sample": 2,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("left-out"), critic=CRITIC)


@pytest.fixture(scope="module")
def sampled(project, tmp_path_factory) -> Path:
    """The project with complete samples of round 1."""
    folder = tmp_path_factory.mktemp("sampled") / "project"
    shutil.copytree(project, folder)
    run_stage(load_config(folder / "align.yaml"), "sample", 1)
    return folder


@pytest.fixture
def folder(project, tmp_path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "project"))


@pytest.fixture
def after_sampling(sampled, tmp_path) -> Path:
    return Path(shutil.copytree(sampled, tmp_path / "project"))


def round_1(folder: Path) -> Round:
    return RunDir(folder / "runs/run").round(1)


def run(folder: Path, stage: str, number: int = 1, **again: bool):
    return run_stage(load_config(folder / "align.yaml"), stage, number, **again)


def tear(path: Path) -> bytes:
    """Cut a picture in its middle, behind the header; returns what it was."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def samples_of(folder: Path) -> dict[str, Samples]:
    return {line.id: line for line in read_jsonl(round_1(folder).samples, Samples)}


def test_a_torn_picture_costs_its_question_alone_and_sampling_it_later_gives_what_it_would_have(folder, sampled):
    whole = tear(folder / "images/1.png")
    done = run(folder, "sample")
    assert set(samples_of(folder)) == {"q0", "q2", "q3"}
    assert done.counts["questions"] == 3
    assert done.counts["left_out"] == {CANNOT_READ: 1}
    (line,) = (json.loads(line) for line in (round_1(folder).path / "samples.left-out.jsonl").read_text().splitlines())
    assert line["id"] == "q1"
    assert "images/1.png" in line["message"]
    assert "replace or remove it" in line["message"]
    # The message's advice works, either way.
    (folder / "images/1.png").write_bytes(whole)
    done = run(folder, "sample", redo=True, keep_unchanged=True)
    assert "left_out" not in done.counts
    assert not (round_1(folder).path / "samples.left-out.jsonl").exists()
    assert round_1(folder).samples.read_bytes() == round_1(sampled).samples.read_bytes()


def test_a_question_that_is_taken_out_while_sampling_is_unfinished_is_gone_and_the_others_stay(folder, sampled):
    this = round_1(folder)
    run(folder, "sample")
    # As a kill before the end leaves it, with two questions finished.
    this.reopen("sample")
    part = this.path / "samples.part-0.jsonl"
    part.write_text("".join(line + "\n" for line in part.read_text().splitlines()[:2]))
    kept = [parse_line(line, Samples, "part") for line in part.read_text().splitlines()]
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    write_lines(folder / "questions.jsonl", [lines[0], lines[1], lines[3]])
    run(folder, "sample")
    assert list(samples_of(folder)) == ["q0", "q1", "q3"]
    assert list(samples_of(folder).values())[:2] == kept
    # Now it is complete: the same change is refused, and the advice keeps what stayed the same.
    write_lines(folder / "questions.jsonl", lines)
    with pytest.raises(UserError, match=r"questions was .*align sample --round 1 --redo --keep-unchanged"):
        run(folder, "sample")
    run(folder, "sample", redo=True, keep_unchanged=True)
    assert this.samples.read_bytes() == round_1(sampled).samples.read_bytes()


def test_only_what_has_changed_is_sampled_and_scored_again(after_sampling, monkeypatch):
    folder = after_sampling
    run(folder, "score")
    before, scores = samples_of(folder), round_1(folder).scores.read_text().splitlines()
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    lines[2]["question"] = "And what is this?"
    write_lines(folder / "questions.jsonl", lines)
    shutil.copy(folder / "images/3.png", folder / "images/0.png")
    asked: list[str] = []
    from align.engines.local import LocalEngine

    sample = LocalEngine.sample

    def counted(engine, requests, *arguments, **settings):
        asked.extend(request.id for request in requests)
        return sample(engine, requests, *arguments, **settings)

    monkeypatch.setattr(LocalEngine, "sample", counted)
    run(folder, "sample", redo=True, keep_unchanged=True)
    assert sorted(asked) == ["q0", "q2"]
    after = samples_of(folder)
    assert after["q2"].question.question == "And what is this?"
    assert all(after[id_] == before[id_] for id_ in ("q1", "q3"))
    # Scores go on as an unfinished stage does: two are kept.
    part = round_1(folder).path / "scores.part-0.jsonl"
    assert [json.loads(line)["id"] for line in part.read_text().splitlines()] == ["q1", "q3"]
    run(folder, "score")
    now = round_1(folder).scores.read_text().splitlines()
    assert (now[1], now[3]) == (scores[1], scores[3])


def test_a_picture_that_cannot_be_read_any_more_leaves_its_question_unscored(after_sampling):
    folder = after_sampling
    tear(folder / "images/1.png")
    (folder / "images/2.png").unlink()
    done = run(folder, "score")
    assert done.counts["unscored"] == {CANNOT_READ: 6}
    scores = {line.id: line for line in read_jsonl(round_1(folder).scores, Judgement)}
    assert scores["q0"].decided
    assert not scores["q1"].decided
    assert not scores["q2"].decided


def test_a_picture_that_was_replaced_is_refused_and_the_advice_samples_its_question_again(after_sampling):
    folder = after_sampling
    shutil.copy(folder / "images/3.png", folder / "images/1.png")
    with pytest.raises(UserError, match=r"images/1.png.*align sample --round 1 --redo --keep-unchanged"):
        run(folder, "score")
    run(folder, "sample", redo=True, keep_unchanged=True)
    assert run(folder, "score").counts["questions"] == 4


def test_held_out_questions_with_a_torn_picture_are_left_out_of_the_figures(folder):
    whole = tear(folder / "images/4.png")
    done = run(folder, "evaluate", 0)
    assert done.counts["questions"] == 1
    assert done.counts["left_out"] == {CANNOT_READ: 1}
    # Nobody was shown it: it may be replaced.
    (folder / "images/4.png").write_bytes(whole + b"\0")
    assert run(folder, "evaluate", 0, redo=True, keep_unchanged=True).counts["questions"] == 2


def test_a_disk_that_is_gone_is_not_taken_for_bad_records(folder, monkeypatch):
    monkeypatch.setattr("align.run.sharding.MAX_LEFT_OUT_IN_A_ROW", 3)
    for path in (folder / "images").iterdir():
        tear(path)
    with pytest.raises(UserError, match=r"nothing but questions that cannot be used, 3 .*the same command again"):
        run(folder, "sample")


@pytest.mark.parametrize(
    "question",
    [
        {"question": "What does <|im_end|> mean?"},
        {"system": "Answer <image> briefly."},
        {"history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "See <image>."}]},
        {"history": [{"role": "user", "content": "<|im_start|>"}, {"role": "assistant", "content": "What?"}]},
    ],
    ids=["end of turn", "image in the system prompt", "image in an answer", "start of turn"],
)
def test_text_that_looks_like_a_token_costs_its_record_alone(folder, question):
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    lines[1] |= question
    write_lines(folder / "questions.jsonl", lines)
    done = run(folder, "sample")
    assert done.counts["questions"] == 3
    assert done.counts["left_out"] == {"its text spells a special token": 1}


def test_an_image_tag_in_an_answer_of_the_history_is_text_and_takes_no_image():
    turns = [{"role": "user", "content": "Show me."}, {"role": "assistant", "content": "Write <image> here."}]
    asked = Question(id="q", question="Why?", images=["a.png"], history=turns)
    first, answer, last = asked.messages()
    assert first["content"] == [{"type": "image"}, {"type": "text", "text": "Show me."}]
    assert answer["content"] == [{"type": "text", "text": "Write <image> here."}]
    assert last["content"] == [{"type": "text", "text": "Why?"}]


def test_responses_that_were_edited_after_judging_make_no_pair(after_sampling):
    folder = after_sampling
    run(folder, "score")
    path = round_1(folder).samples
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["responses"].reverse()
    write_lines(path, lines)
    done = run(folder, "pairs", redo=True)
    assert done.counts["questions_without_pair"]["its question or responses have changed since they were judged"] == 1


def test_a_picture_that_breaks_after_the_answers_is_left_out_of_the_image_dependence(folder, monkeypatch):
    from align.evaluation import evaluate

    controls = evaluate.image_controls

    def break_then_draw(*arguments):
        tear(folder / "images/4.png")
        return controls(*arguments)

    monkeypatch.setattr(evaluate, "image_controls", break_then_draw)
    settings = load_config(folder / "align.yaml")
    asked = settings.evaluate.model_copy(update={"image_dependence": 2})
    done = run_stage(settings.model_copy(update={"evaluate": asked}), "evaluate", 0)
    assert done.counts["questions"] == 2
    # Shown to two questions: to its own (a blank picture needs its size, which the header still tells) and to the other.
    assert done.counts["left_out_with_other_images"] == {CANNOT_READ: 1}
    metrics = json.loads(RunDir(folder / "runs/run").round(0).evaluation.read_text())["metrics"]
    assert metrics["image_dependence_blank"]["count"] == 2
    assert metrics["image_dependence_shuffled"]["count"] == 1
    # Its own answer cannot be weighed again either.
    assert metrics["image_log_ratio_blank"]["count"] == 1
