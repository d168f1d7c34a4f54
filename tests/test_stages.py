"""The stages through the real command line on a tiny model: whole, interrupted, shared over processes, and misused."""

import json
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from tests.stage_runs import SETTINGS, Command, align, align_in_two_processes, make_project, write_lines


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose two rounds have been run with one command; no response is complete, so all get further ones."""
    further = {"until_pair": True, "max_responses": 5, "further_temperature": 1.4}
    folder = make_project(tmp_path_factory.mktemp("project"), sample=SETTINGS["sample"] | further)
    result = align(folder, "run")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def fresh(project, tmp_path):
    """The same project before anything was run."""
    shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("runs"))
    return tmp_path / "project"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_every_file_of_every_round(project):
    run = project / "runs" / "run"
    for number in (1, 2):
        names = {path.name for path in (run / f"round-{number}").iterdir() if not path.name.startswith(".")}
        assert {
            "samples.jsonl",
            "scores.jsonl",
            "pairs.jsonl",
            "evaluation.json",
            "manifest.json",
            "checkpoint",
        } <= names
        assert not {name for name in names if ".part-" in name}
        stages = json.loads((run / f"round-{number}" / "manifest.json").read_text())["stages"]
        assert {stages[stage]["status"] for stage in ("sample", "score", "pairs", "dpo", "evaluate")} == {"complete"}
        card = (run / f"round-{number}" / "checkpoint" / "README.md").read_text()
        assert stages["sample"]["inputs"]["policy"][:16] in card
    assert (run / "report.html").stat().st_size > 1000
    assert (run / "round-0" / "evaluation.json").exists()


def test_a_round_starts_from_the_checkpoint_before_it(project):
    run = project / "runs" / "run"
    parent = json.loads((run / "round-2" / "manifest.json").read_text())["stages"]["sample"]["inputs"]["policy"]
    evaluated = json.loads((run / "round-1" / "manifest.json").read_text())["stages"]["evaluate"]["inputs"][
        "checkpoint"
    ]
    assert parent == evaluated
    before, after = (load_file(run / f"round-{n}" / "checkpoint" / "model.safetensors") for n in (1, 2))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_a_finished_run_does_nothing_again(project):
    before = {path: path.stat().st_mtime_ns for path in (project / "runs").rglob("*.jsonl")}
    result = align(project, "run")
    assert result.returncode == 0, result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (project / "runs").rglob("*.jsonl")}


def test_two_processes_give_the_same_samples_scores_and_evaluation_as_one(project, fresh):
    for stage in ("sample", "score", "evaluate"):
        align_in_two_processes(fresh, stage)
    round_1 = [f"round-1/{name}" for name in ("samples.jsonl", "scores.jsonl", "pairs.jsonl")]
    for name in (*round_1, "round-0/evaluation.jsonl", "round-0/evaluation.json"):
        mine, theirs = (folder / "runs/run" / name for folder in (fresh, project))
        assert mine.read_text() == theirs.read_text(), name
    counts, alone = (
        json.loads((folder / "runs/run/round-1/manifest.json").read_text())["stages"]["sample"]["counts"]
        for folder in (fresh, project)
    )
    assert counts == alone
    assert counts["further_responses"] > 0


def test_two_processes_find_the_same_distance_from_the_first_policy_as_one_and_both_count_their_cost(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")
    align_in_two_processes(folder, "evaluate", "--round", "1", "--redo")
    mine, theirs = (here / "runs/run/round-1" for here in (folder, project))
    for name in ("log-probs-own.jsonl", "log-probs-first.jsonl"):
        for one, other in zip(lines(mine / name), lines(theirs / name), strict=True):
            assert (one["id"], one["num_tokens"]) == (other["id"], other["num_tokens"])
            assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-3)
    found, expected = (json.loads((here / "evaluation.json").read_text())["metrics"] for here in (mine, theirs))
    assert found["kl"] == pytest.approx(expected["kl"], abs=1e-3)
    assert expected["kl"]["mean"] != 0
    cost, alone = (
        json.loads((here / "manifest.json").read_text())["stages"]["evaluate"]["cost"] for here in (mine, theirs)
    )
    assert (cost["num_processes"], alone["num_processes"]) == (2, 1)
    for name in ("tokens_read", "tokens_written"):
        assert cost[name] == alone[name] > 0
    assert len(list(mine.glob(".spent-evaluate-*.json"))) == 2


def test_a_killed_stage_goes_on_and_ends_like_an_uninterrupted_one(project, fresh):
    part = fresh / "runs/run/round-1/samples.part-0.jsonl"
    process = Command(fresh, "sample")
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.end()
    assert not (fresh / "runs/run/round-1/samples.jsonl").exists()
    finished = part.read_bytes().count(b"\n")
    with part.open("a") as file:
        file.write('{"id": "q3", "torn')
    result = align(fresh, "sample")
    assert result.returncode == 0, result.stderr
    assert 0 < finished < 4
    mine, theirs = (folder / "runs/run/round-1/samples.jsonl" for folder in (fresh, project))
    assert mine.read_text() == theirs.read_text()


def test_samples_do_not_depend_on_the_order_of_questions_or_the_batch(project, fresh):
    write_lines(fresh / "questions.jsonl", lines(fresh / "questions.jsonl")[::-1])
    result = align(fresh, "sample", "--set", "sample.batch_size=3")
    assert result.returncode == 0, result.stderr
    mine, theirs = (lines(folder / "runs/run/round-1/samples.jsonl") for folder in (fresh, project))
    assert {line["id"]: line["responses"] for line in mine} == {line["id"]: line["responses"] for line in theirs}


def test_pairs_can_be_made_again_without_judging_again(fresh):
    assert align(fresh, "sample").returncode == 0
    assert align(fresh, "score").returncode == 0
    before = (fresh / "runs/run/round-1/scores.jsonl").stat().st_mtime_ns
    refused = align(fresh, "pairs", "--set", "pairs.strategy=topk_bottomk", "--set", "pairs.max_per_question=2")
    assert refused.returncode == 2
    assert "pairs.strategy was best_worst and is now topk_bottomk" in refused.stderr
    again = align(
        fresh, "pairs", "--redo", "--set", "pairs.strategy=all_above_margin", "--set", "pairs.max_per_question=2"
    )
    assert again.returncode == 0, again.stderr
    assert len(lines(fresh / "runs/run/round-1/pairs.jsonl")) == 8
    assert (fresh / "runs/run/round-1/scores.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", ["score", "dpo"])
def test_images_that_were_replaced_since_sampling_are_refused(project, tmp_path, stage):
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    shutil.copy(folder / "images/1.png", folder / "images/2.png")
    result = align(folder, stage, "--round", "1", "--redo")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "the image 'images/2.png' is not the one that was used so far" in result.stderr
    (folder / "images/2.png").write_bytes((project / "images/2.png").read_bytes())
    assert align(folder, "score", "--round", "1").returncode == 0


def _remove_image(folder):
    (folder / "images/1.png").unlink()


def _break_image(folder):
    (folder / "images/1.png").write_bytes(b"no image")


def _empty_question(folder):
    write_lines(folder / "questions.jsonl", [{"id": "q0", "question": " "}])


def _duplicate_ids(folder):
    write_lines(folder / "questions.jsonl", [{"id": "q0", "question": "a?"}, {"id": "q0", "question": "b?"}])


def _not_json(folder):
    (folder / "questions.jsonl").write_text('{"id": "q0", "question": "a?"}\n{broken\n')


def _no_questions(folder):
    (folder / "questions.jsonl").write_text("")


def _bad_yaml(folder):
    (folder / "align.yaml").write_text("policy: [")


def _no_checkpoint(folder):
    shutil.rmtree(folder / "policy")


def _no_weights(folder):
    (folder / "policy" / "model.safetensors").unlink()


def _torn_weights(folder):
    path = folder / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def _unknown_architecture(folder):
    path = folder / "policy" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["NoSuchModel"], "model_type": "nosuch"})
    )


BAD_INPUT = [
    (_remove_image, ["sample"], "no image 'images/1.png'"),
    (_break_image, ["sample"], "not a readable image"),
    (_empty_question, ["sample"], "questions.jsonl:1: .*question is empty"),
    (_duplicate_ids, ["sample"], "'q0' is duplicated"),
    (_not_json, ["sample"], "questions.jsonl:2: not valid JSON"),
    (_no_questions, ["sample"], "no questions"),
    (_bad_yaml, ["sample"], "not valid YAML"),
    (_no_checkpoint, ["sample"], "no such checkpoint"),
    (_no_weights, ["sample"], "weights|safetensors"),
    (_torn_weights, ["sample"], "safetensors"),
    (_unknown_architecture, ["sample"], "NoSuchModel"),
    (None, ["sample", "--set", "sample.num_responses=1"], "num_responses is 1"),
    (None, ["sample", "--set", "sample.temprature=1"], "did you mean 'temperature'"),
    (None, ["sample", "--set", "model.processor={no_such_setting: 1}"], "no_such_setting"),
    (None, ["sample", "--round", "2"], "round 1 has no complete dpo stage"),
    (None, ["score"], "round 1 has no complete sample stage"),
    (None, ["dpo"], "no pairs"),
    (None, ["evaluate", "--set", "evaluate.questions=questions.jsonl"], "also trained on"),
    (None, ["sample", "--config", "nowhere.yaml"], "no such configuration"),
]


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"), BAD_INPUT, ids=lambda value: getattr(value, "__name__", None)
)
def test_bad_input_gives_one_clear_message_and_exit_code_2(fresh, spoil, arguments, message):
    if spoil is not None:
        spoil(fresh)
    result = align(fresh, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    import re

    assert re.search(message, result.stderr)
    assert not (fresh / "runs/run/round-1/samples.jsonl").exists()


BAD_SCORING = [
    (["--set", "critic.kind=pairwize"], "did you mean pairwise"),
    (["--set", "critic.kind=pairwise"], "needs a model"),
    (["--set", "critic.kind=pairwise", "--set", "critic.model=./nowhere"], "no such checkpoint"),
    (["--set", "critic.kind=pairwise", "--set", "critic.model=./critic", "--set", "critic.prompt=nowhere"], "nowhere"),
    (["--set", "critic.options={sead: 1}"], "did you mean seed"),
    (
        [
            "--set",
            "critic.kind=pairwise",
            "--set",
            "critic.model=./critic",
            "--set",
            "critic.options={min_option_mass: 0.99}",
        ],
        "the critic could score none of 4 questions: ",
    ),
    (["--set", "pairs.min_margin=100"], "no pair is left of 4 questions: below the minimum margin"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_SCORING, ids=lambda value: value[-1] if isinstance(value, list) else None
)
def test_a_critic_that_cannot_judge_is_said_and_nothing_is_lost(project, fresh, arguments, message):
    target = fresh / "runs/run/round-1"
    target.mkdir(parents=True)
    source = project / "runs/run/round-1"
    shutil.copy(source / "samples.jsonl", target)
    stages = json.loads((source / "manifest.json").read_text())["stages"]
    (target / "manifest.json").write_text(json.dumps({"stages": {"sample": stages["sample"]}}))
    result = align(fresh, "score", *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert message in result.stderr
    assert (target / "samples.jsonl").read_text() == (source / "samples.jsonl").read_text()
    assert not (target / "pairs.jsonl").exists()
    if message.startswith("no pair is left"):
        refused = json.loads((target / "manifest.json").read_text())["stages"]["pairs"]
        assert refused["status"] == "running"
        assert message in refused["refused"]
        assert sum(refused["counts"]["questions_without_pair"].values()) == 4
        assert message in align(fresh, "status", "runs/run").stdout.replace("\n", " ")
        assert align(fresh, "report", "runs/run").returncode == 0
        assert message in (fresh / "runs/run/report.html").read_text()
