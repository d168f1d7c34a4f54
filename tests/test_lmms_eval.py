"""lmms-eval's own evaluator on local tasks, answered by the demo's Valley-Eagle;
expected values from stock transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from align.cli import app
from align.config import build_config
from align.demo.data import POLICY
from align.errors import UserError
from align.hub.model_card import write_model_card
from align.lmms_eval.instances import generation_request, numbered
from align.lmms_eval.results import counts_of
from align.lmms_eval.tasks import find_tasks, require_lmms_eval
from align.lmms_eval.visuals import Unaskable, dialogue_of
from align.media.video import uniform
from align.report import write_report
from align.run.folder import RunDir
from tests.forks import in_a_process
from tests.lmms_tasks import CHOICES, Stock, write_tasks
from tests.report.fake_run import FakeRun
from tests.stage_runs import align, align_in_two_processes
from tests.test_video import greys, write_video
from tests.tiny_models import random_image

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (docs/evaluation.md)"
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture(scope="module")
def documents(folder):
    return write_tasks(folder / "tasks")


@pytest.fixture(scope="module")
def summary(folder, documents):
    """Three tasks by two processes, in lmms-eval's own evaluator."""
    tasks = ["--lmms-eval", "shown,chosen,told", "--lmms-eval-tasks", "tasks"]
    said = align_in_two_processes(folder, "evaluate", *tasks, "--checkpoint", str(POLICY), **OFFLINE)
    assert "shown: 6 of 6 requests were asked otherwise than the task says" in " ".join(said.split())
    return json.loads((folder / "policy.lmms-eval.json").read_text())


@pytest.fixture(scope="module")
def stock():
    return Stock()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(summary, task, metric):
    return summary["tasks"][task]["results"][task]["metrics"][metric]["value"]


@needs_lmms_eval
@pytest.mark.slow
def test_generated_answers_are_those_of_stock_transformers(summary, folder, documents, stock):
    expected = []
    for index, document in enumerate(documents):
        picture = Path(document["picture"])
        question = document["question"].removesuffix("<image>")
        content = [question, picture] if index == 2 else [picture, question]
        expected.append(stock.says(content, 32).split(" and")[0])
    found = lines(folder / "policy.lmms-eval" / "shown.jsonl")
    assert [line["text"] for line in found] == expected
    assert len(set(expected)) > 3
    right = sum(text == document["answer"] for text, document in zip(expected, documents, strict=True))
    assert number(summary, "shown", "exact_match") == pytest.approx(right / 6)
    assert summary["tasks"]["shown"]["counts"]["notes"] == {"not followed: image_aspect_ratio": 6}


@needs_lmms_eval
@pytest.mark.slow
def test_weighed_choices_have_stock_log_probabilities(summary, folder, documents, stock):
    found = lines(folder / "policy.lmms-eval" / "chosen.jsonl")
    right = 0
    for index, document in enumerate(documents):
        means = []
        for line, choice in zip(found[4 * index : 4 * index + 4], CHOICES, strict=True):
            values, greedy = stock.weighs([Path(document["picture"]), "What is it?"], choice)
            assert (line["doc_id"], line["continuation"], line["num_tokens"]) == (index, choice, len(values))
            assert line["log_prob"] == pytest.approx(math.fsum(values), abs=1e-4)
            assert line.get("is_greedy", False) == greedy
            means.append(math.fsum(values) / len(values))
        right += means.index(max(means)) == document["gold"]
    assert number(summary, "chosen", "acc") == pytest.approx(right / 6)


@needs_lmms_eval
@pytest.mark.slow
def test_a_task_with_messages_of_its_own_is_asked_with_these(summary, folder, documents, stock):
    found = lines(folder / "policy.lmms-eval" / "told.jsonl")
    pictures = [[Path(document["picture"]), Path(document["other"])] for document in documents]
    turns = [["What is in the picture?", *two, "How many digits are there?"] for two in pictures]
    assert [line["text"] for line in found] == [stock.says(turn, 8) for turn in turns]


def say_all(folder: Path, out: Path) -> None:
    """Several commands, one after the other in this process; what came of each goes to a file.

    Not in the tests' own: lmms-eval's tasks let Pillow read torn images from then on.
    """
    import tenacity
    from lmms_eval.tasks import TaskManager

    os.chdir(folder)
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    # lmms-eval waits for seconds before it tries again to fetch what is not there.
    tenacity.nap.time = SimpleNamespace(sleep=lambda seconds: None)

    def call(*arguments: str) -> str:
        try:
            app(["evaluate", "--lmms-eval", *arguments, "--lmms-eval-tasks", "tasks"], standalone_mode=False)
        except UserError as error:
            return str(error)
        return "done"

    policy = ("--checkpoint", str(POLICY))
    again = ("shown", *policy, "--out", "again.json")
    said = {
        "resumed": call(*again),
        "finished": call(*again),
        "changed": call(*again, "--limit", "2"),
        "of a run": call("shown", "--limit", "2"),
        "unknown": call("shonw", *policy),
        "rounds": call("rounds", *policy),
        "deaf": call("deaf", *policy),
        "lost": call("lost", *policy),
    }
    by_python = TaskManager("WARNING", "tasks", include_defaults=False).task_index
    said["tasks"] = sorted(by_python) if by_python == find_tasks(["shown"], Path("tasks")).task_index else "differ"
    out.write_text(json.dumps(said))


@pytest.fixture(scope="module")
def said(summary, folder):
    """What several commands said, in one process; the first resumes where another was killed."""
    done = folder / "policy.lmms-eval"
    kept = [line | {"text": f"kept {line['doc_id']}"} for line in lines(done / "shown.jsonl")[:2]]
    again = folder / "again"
    again.mkdir()
    torn = "".join(json.dumps(line) + "\n" for line in kept) + '{"id": "shown/2'
    (again / "shown.part-0.jsonl").write_text(torn)
    begun = json.loads((done / "manifest.json").read_text())["stages"]["shown"] | {"status": "running"}
    (again / "manifest.json").write_text(json.dumps({"stages": {"shown": begun}}))
    settings = {"policy": str(POLICY), "questions": "questions.jsonl"}
    (folder / "align.yaml").write_text(json.dumps(settings))
    in_a_process(say_all, folder, folder / "said.json")
    return json.loads((folder / "said.json").read_text())


@needs_lmms_eval
@pytest.mark.slow
def test_an_interrupted_task_keeps_what_was_answered(said, folder):
    assert said["resumed"] == said["finished"] == "done"
    before, after = lines(folder / "policy.lmms-eval" / "shown.jsonl"), lines(folder / "again" / "shown.jsonl")
    assert [line["text"] for line in after[:2]] == ["kept 0", "kept 1"]
    assert after[2:] == before[2:]
    assert not list((folder / "again").glob("*.part-*"))
    assert "limit was None and is now 2" in said["changed"]


@needs_lmms_eval
@pytest.mark.slow
def test_the_faster_parser_finds_the_same_tasks(said):
    assert {"chosen", "deaf", "lost", "rounds", "shown", "told"} <= set(said["tasks"])


@needs_lmms_eval
@pytest.mark.slow
def test_a_run_keeps_the_numbers_in_its_round(said, summary, folder):
    assert said["of a run"] == "done"
    found = json.loads((folder / "runs/run/round-0/lmms-eval.json").read_text())
    assert found["round"] == 0
    assert found["checkpoint_sha256"] == summary["checkpoint_sha256"]
    assert found["tasks"]["shown"]["results"]["shown"]["documents"] == 2
    assert len(lines(folder / "runs/run/round-0" / found["tasks"]["shown"]["responses"])) == 2


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unknown", "no task 'shonw'; the nearest are shown"),
        ("rounds", "asks in several rounds"),
        ("deaf", "none of its 6 requests can be asked: sound is not supported"),
        ("lost", "the task's dataset cannot be had"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(said, case, words):
    assert words in said[case]


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; python -m pip install 'lmms-eval\W"):
        require_lmms_eval()


def test_options_of_benchmarks_need_their_tasks(tmp_path):
    done = align(tmp_path, "evaluate", "--limit", "2")
    assert done.returncode == 2
    assert "go with --lmms-eval" in done.stderr


def no_frames(*_):
    raise AssertionError("there is no video")


def test_pictures_stand_where_the_prompt_names_them_all():
    two = [random_image(0), random_image(1)]
    inside = dialogue_of(two, "<image> or <image>?", False, no_frames)
    assert [part["type"] for part in inside.messages[0]["content"]] == ["image", "text", "image", "text"]
    fewer = dialogue_of(two, "<image> or that?", False, no_frames)
    assert [part["type"] for part in fewer.messages[0]["content"]] == ["image", "image", "text"]
    assert (inside.num_marks, fewer.num_marks, fewer.text) == (0, 1, " or that?")


def test_a_video_becomes_the_frames_that_the_family_looks_at(tmp_path):
    path = write_video(tmp_path / "clip.mp4")
    found = dialogue_of([str(path)], "What happens?", False, lambda count, rate: uniform(count, rate, count=3))
    assert greys(found.images) == [0, 6, 12]
    assert [part["type"] for part in found.messages[0]["content"]] == ["image"] * 3 + ["text"]


@pytest.mark.parametrize(
    ("visual", "reason"),
    [
        ("https://example.org/a.png", "addresses are not fetched"),
        ("speech.wav", "sound is not supported"),
        ({"array": [0.0], "sampling_rate": 16000}, "sound is not supported"),
        ({"type": "video", "path": "a.mp4", "video_start": 1.0}, "pieces of videos are not supported"),
        (3, "visuals of this kind are not supported"),
    ],
)
def test_what_cannot_be_shown_has_a_reason(visual, reason):
    with pytest.raises(Unaskable, match=reason):
        dialogue_of([visual], "What is it?", False, no_frames)


class Asked:
    """The part of an Instance that is read."""

    def __init__(self, *args):
        self.args, self.metadata, self.task_name = args, {}, args[4]


def test_the_same_question_twice_is_two_requests_and_another_prompt_is_another():
    def asked(prompt):
        return Asked(prompt, {"max_new_tokens": 4}, lambda doc: [], 0, "t", "test")

    requests = numbered(map(generation_request, [asked("A?"), asked("A?"), asked("B?")]))
    first, second, other = [request.id for request in requests]
    assert first.removesuffix("/0") == second.removesuffix("/1")
    assert other.split("/")[2] != first.split("/")[2]


def test_requests_that_were_not_asked_are_counted_by_reason():
    request = generation_request(Asked("A?", {}, lambda doc: [], 0, "t", "test"))
    records = [
        request.answered(text="yes", num_tokens=2),
        request.answered(skipped="sound is not supported"),
        request.answered(text="n", num_tokens=1, finish_reason="length"),
    ]
    skipped = {"sound is not supported": 1}
    assert counts_of(records) == {"requests": 3, "tokens": 3, "truncated": 1, "skipped": skipped}


BENCHMARKS = {
    "tasks": {
        "mme": {
            "results": {"mme": {"documents": 9, "metrics": {"acc": {"value": 0.4567, "stderr": 0.1, "higher_is_better": True}}}},
            "counts": {"requests": 9, "skipped": {"sound is not supported": 2}},
        }
    }
}  # fmt: skip


@pytest.fixture
def with_benchmarks(tmp_path):
    run = FakeRun(tmp_path / "runs" / "run", skill=(0.4, 0.6), num_held_out=8, num_training=4).build()
    RunDir(run).round(1).benchmarks.write_text(json.dumps(BENCHMARKS))
    return run


def test_the_report_shows_benchmarks_by_round(with_benchmarks):
    page = write_report(with_benchmarks).read_text()
    assert "lmms-eval" in page
    assert "0.4567" in page
    assert "9, 2 not asked" in page
    RunDir(with_benchmarks).round(1).benchmarks.unlink()
    assert "0.4567" not in write_report(with_benchmarks).read_text()


def test_the_card_shows_benchmarks_of_its_round(with_benchmarks):
    config = build_config({"policy": "x", "questions": "q", "run_root": str(with_benchmarks.parent)}, base=Path("/"))
    card = write_model_card(config, 1).read_text()
    assert "| mme | acc | 0.4567 | 0.1 | 9, 2 not asked |" in card


def test_a_round_trained_anew_loses_the_numbers_of_the_old_one(with_benchmarks):
    this = RunDir(with_benchmarks).round(1)
    (this.path / "lmms-eval").mkdir()
    this.discard("evaluate")
    assert this.benchmarks.exists()
    this.discard("dpo")
    assert not this.benchmarks.exists()
    assert not (this.path / "lmms-eval").exists()
