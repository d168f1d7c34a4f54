"""A critic of one's own in a round: by function, by file, and from finished scores and people's ratings."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml

from align.check.preflight import run_preflight
from align.errors import UserError
from align.run.folder import RunDir
from align.stages.pairs import run_pairs
from align.stages.score import run_score
from tests.critic_runs import NUM_QUESTIONS, TEXTS, config_of, score, score_counts, score_lines, write_round
from tests.doc_pages import ROOT, blocks_of

BY_LENGTH = "def judge(question, images, responses):\n    return [float(len(r)) for r in responses]\n"


@pytest.fixture
def folder(tmp_path):
    write_round(tmp_path)
    return tmp_path


def inputs_of(folder):
    return RunDir(folder / "runs/run").round(1).manifest.stage("score").inputs


def test_a_function_in_a_file_beside_the_configuration_scores_a_round(folder):
    (folder / "mine.py").write_text(BY_LENGTH)
    counts = score(folder, kind="python", function="mine.py:judge")
    assert counts["scored"] == NUM_QUESTIONS * len(TEXTS)
    assert score_lines(folder)[0].rewards == [float(len(f"{t[:-1]}, 0." if t != "It is 7." else t)) for t in TEXTS]
    assert inputs_of(folder)["function"].endswith(":judge")
    run_pairs(config_of(folder, critic={"kind": "python", "function": "mine.py:judge"}), 1)


def test_a_changed_function_is_another_critic_and_a_moved_run_is_not(folder, tmp_path):
    critic = {"kind": "python", "function": "mine.py:judge"}
    (folder / "mine.py").write_text(BY_LENGTH)
    score(folder, **critic)
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    shutil.copytree(folder, moved)
    run_score(config_of(moved, critic=critic), 1)
    (folder / "mine.py").write_text(BY_LENGTH.replace("len(r)", "-len(r)"))
    with pytest.raises(UserError, match=r"function was .* and is now"):
        run_score(config_of(folder, critic=critic), 1)


def test_images_reach_the_function_as_pictures_and_what_fails_is_counted(folder):
    sizes = []

    def mine(question, images, responses):
        sizes.append(images[0].size)
        if len(sizes) == 2:
            raise ValueError("no such thing")
        return [1.0, None, float("nan"), 0.0]

    run_score(config_of(folder), 1, critic=mine)
    counts = score_counts(folder)
    assert len(sizes) == NUM_QUESTIONS
    assert all(isinstance(side, int) for size in sizes for side in size)
    assert counts["scored"] == 2 * (NUM_QUESTIONS - 1)
    assert counts["unscored"]["the function returned None"] == NUM_QUESTIONS - 1
    assert counts["unscored"]["the function returned a number that is not finite"] == NUM_QUESTIONS - 1
    (raised,) = (reason for reason in counts["unscored"] if "raised" in reason)
    assert raised.startswith("the function raised ValueError (test_own_critic.py, line ")
    stage = RunDir(folder / "runs/run").round(1).manifest.stage("score")
    assert stage.settings["critic"]["kind"] == "python"
    assert stage.inputs["function"].endswith("mine")


def test_another_function_is_another_critic(folder):
    run_score(config_of(folder), 1, critic=lambda question, images, responses: [1.0] * len(responses))
    with pytest.raises(UserError, match=r"function was .* and is now"):
        run_score(config_of(folder), 1, critic=lambda question, images, responses: [2.0] * len(responses))


def test_a_function_that_always_fails_stops_the_stage_with_its_line(folder):
    (folder / "mine.py").write_text("def judge(question, images, responses):\n    return responses[99]\n")
    with pytest.raises(UserError, match=r"could score none .* IndexError \(mine\.py, line 2\) \(16\)"):
        score(folder, kind="python", function="mine.py:judge")


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        ({"kind": "python", "function": "mine.py:judge"}, "there is no file .*mine.py"),
        ({"kind": "python"}, "function must be given"),
        (
            {"kind": "verifier", "function": "mine.py:judge"},
            "critic.function is set, and the verifier critic takes none",
        ),
        ({"kind": "ratings", "file": "nothing.jsonl"}, "nothing.jsonl: cannot be read"),
        ({"kind": "scores"}, "file must be given"),
    ],
)
def test_check_finds_what_is_wrong_before_anything_runs(folder, critic, message):
    problems = run_preflight(config_of(folder, critic=critic)).problems
    assert any(problem.area == "critic" and re.search(message, str(problem)) for problem in problems)


def test_scores_of_two_critics_become_one_file_without_judging(tmp_path):
    for name, sign in (("long", ""), ("short", "-")):
        write_round(tmp_path / name)
        (tmp_path / name / "mine.py").write_text(BY_LENGTH.replace("float(", f"{sign}float("))
        score(tmp_path / name, kind="python", function="mine.py:judge")
    write_round(tmp_path / "both")
    members = {
        name: {"kind": "scores", "file": f"../{name}/runs/run/round-1/scores.jsonl"} for name in ("long", "short")
    }
    score(tmp_path / "both", kind="panel", options={"critics": members, "weights": {"long": 3}})
    merged, long = score_lines(tmp_path / "both"), score_lines(tmp_path / "long")
    for line, other in zip(merged, long, strict=True):
        order = sorted(range(len(TEXTS)), key=line.rewards.__getitem__)
        assert order == sorted(range(len(TEXTS)), key=other.rewards.__getitem__)
        assert set(line.evidence["members"]) == {"long", "short"}
    assert {"file long", "file short"} <= set(inputs_of(tmp_path / "both"))


def test_the_example_of_the_page_merges_finished_scores_by_the_panel_s_rules(folder):
    (example,) = [
        yaml.safe_load(block.text)["critic"]
        for block in blocks_of(ROOT / "docs" / "critics.md")
        if block.language == "yaml" and "kind: scores" in block.text
    ]
    for name, rewards in (("large", [9.0, 5.0, 2.0, 1.0]), ("small", [0.1, 0.9, 0.8, 0.2])):
        lines = [json.dumps({"id": f"q{index}", "rewards": rewards}) + "\n" for index in range(NUM_QUESTIONS)]
        (folder / f"scores-{name}.jsonl").write_text("".join(lines))
    assert score(folder, **example)["scored"] == NUM_QUESTIONS * len(TEXTS)
    # Ranks of large 1, 1/3, -1/3, -1; of small -1, 1, 1/3, -1/3; and their means.
    for line in score_lines(folder):
        assert line.rewards == pytest.approx([0, 2 / 3, 0, -2 / 3])
        assert line.evidence["members"]["small"]["rewards"] == [0.1, 0.9, 0.8, 0.2]


def test_scores_of_other_samples_are_refused(tmp_path):
    write_round(tmp_path / "one", num_questions=3)
    (tmp_path / "one" / "mine.py").write_text(BY_LENGTH)
    score(tmp_path / "one", kind="python", function="mine.py:judge")
    write_round(tmp_path / "two")
    with pytest.raises(UserError, match="these scores are of other samples than this round's"):
        score(tmp_path / "two", kind="scores", file="../one/runs/run/round-1/scores.jsonl")


def test_people_are_a_critic(folder):
    lines = [
        {"question_id": f"q{index}", "responses": [0, 1], "preferred": 1, "annotator": "anna"} for index in range(2)
    ]
    (folder / "ratings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = score(folder, kind="ratings", file="ratings.jsonl")
    assert counts["scored"] == 4
    assert counts["unscored"] == {"nobody rated it": 4 * len(TEXTS) - 4}
    assert [line.rewards[:2] for line in score_lines(folder)[:2]] == [[-1.0, 1.0]] * 2
