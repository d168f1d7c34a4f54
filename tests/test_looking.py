"""Commands that only look: info, status, compare, chat."""

import json
import os

import pytest

from align.errors import UserError
from align.evaluation.compare import compare_runs
from align.models.inspect import inspect_checkpoint
from align.records import Evaluated, Evaluation, Question, write_jsonl
from align.run.folder import RunDir
from align.status.run_status import run_status
from tests.stage_runs import align, make_project

GOLDEN = "tests/golden/valley_eagle_tiny"


def test_info_counts_what_the_golden_says(request):
    folder = request.config.rootpath / GOLDEN
    found = inspect_checkpoint(folder, folder / "images" / "square_small_0.png")
    cases = json.loads((folder / "cases.json").read_text())
    expected = next(case["seq_len"] for case in cases if case["name"] == "square_small")
    # The golden asks "Describe the image." (20 bytes less one merge), `info` asks "What is shown?".
    question_tokens = {text: len(_ids(folder, text)) for text in ("Describe the image.", "What is shown?")}
    difference = question_tokens["What is shown?"] - question_tokens["Describe the image."]
    assert found.num_prompt_tokens == expected + difference
    assert found.architecture == "ValleyQwen2ForCausalLM"
    assert sum(found.parameters.values()) * 4 == found.num_bytes
    assert set(found.parameters) == {"vision", "projector", "language"}


def _ids(folder, text):
    from align.models.load import load_processor

    return load_processor(folder).tokenizer(text, add_special_tokens=False)["input_ids"]


def test_status_tells_running_stopped_and_complete_apart(tmp_path):
    run = RunDir(tmp_path / "run")
    this = run.round(1)
    with pytest.raises(UserError, match="no round has begun"):
        run_status(run.path)
    this.path.mkdir(parents=True)
    this.manifest.begin("sample", settings={}, inputs={})
    this.manifest.finish("sample", outputs=[], counts={"questions": 3}, seconds=2)
    this.manifest.begin("score", settings={}, inputs={})
    (this.path / "scores.part-0.jsonl").write_text("{}\n{}\n")
    stopped = run_status(run.path)
    assert [(line.stage, line.state) for line in stopped.stages] == [("sample", "complete"), ("score", "stopped")]
    assert (stopped.working, stopped.next_command) == ("", "align run")
    with this.lock():
        running = run_status(run.path)
    assert running.stages[1].state == "running"
    assert running.stages[1].detail == "2 questions finished"
    assert running.working.startswith(f"round 1 score is running (process {os.getpid()} on ")


def evaluated(path, right):
    this = RunDir(path).round(3)
    this.path.mkdir(parents=True)
    lines = [
        Evaluation(
            id=f"q{index}",
            question=Question(id=f"q{index}", question="?", answer="x"),
            greedy=Evaluated(text="x", num_tokens=1, correct=flag),
            sampled=[Evaluated(text="x", num_tokens=1, correct=flag)],
        )
        for index, flag in enumerate(right)
    ]
    write_jsonl(this.evaluation_lines, lines)


def test_runs_are_compared_on_the_questions_they_share(tmp_path):
    evaluated(tmp_path / "one", [False, False, True, True])
    evaluated(tmp_path / "other", [True, True, True, True, False])
    found = compare_runs(tmp_path / "one", tmp_path / "other")
    assert found["greedy_accuracy"].mean == 0.5
    assert found["greedy_accuracy"].count == 4
    assert compare_runs(tmp_path / "other", tmp_path / "one")["greedy_accuracy"].mean == -0.5


def test_chat_answers_and_bad_folders_are_told(tmp_path):
    project = make_project(tmp_path)
    result = align(project, "chat", "policy", "--image", "images/1.png", "-q", "What?", "--max-new-tokens", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip("\n") != ""
    for arguments, message in (
        (["chat", "policy", "--image", "images/none.png", "-q", "?"], "no image"),
        (["info", "images"], "no config.json"),
        (["convert", "policy", "out", "--to", "nonsense"], "nonsense"),
        (["status", "images"], "no round has begun"),
    ):
        refused = align(project, *arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
