import json

from align.config import load_config
from align.evaluation.against_parent import worse_than_parent
from align.evaluation.win_rate import _item, compare_answers, has_judge, summarise, win_rates
from align.records import Evaluated, Evaluation, Question, Turn, read_jsonl, write_jsonl
from align.run.folder import RunDir
from tests.stage_runs import align, make_project, write_lines


def lines(texts, right=None):
    return [
        Evaluation(
            id=f"q{index}",
            question=Question(id=f"q{index}", question="What?", images=["images/1.png"], answer="x"),
            greedy=Evaluated(text=text, num_tokens=1),
            sampled=[Evaluated(text=text, num_tokens=1, correct=flag)],
        )
        for index, (text, flag) in enumerate(zip(texts, right or [None] * len(texts), strict=True))
    ]


def test_ties_count_half_and_failures_are_left_out():
    found = summarise([1.0, 0.0, 0.5, None])
    assert found.rate.mean == 0.5
    assert found.rate.count == 3
    assert (found.num_ties, found.num_unjudged) == (1, 1)
    assert summarise([None]).rate is None


def test_win_rates_of_a_critic_model_mirror_when_the_sides_are_changed(tmp_path):
    folder = make_project(
        tmp_path,
        critic={"kind": "pairwise", "model": "./critic", "prompt": "pairwise_short", "options": {"soft": True}},
    )
    config = load_config(folder / "align.yaml")
    assert has_judge(config)
    one, other = lines(["a", "bb", "same", "dddd"]), lines(["xx", "b", "same", "d"])
    forth = win_rates(compare_answers(config, one, {"initial": other}, tmp_path / "critic"))["initial"]
    back = win_rates(compare_answers(config, other, {"initial": one}, tmp_path / "critic"))["initial"]
    assert forth.rate.mean + back.rate.mean == 1.0
    assert forth.num_ties >= 1
    assert forth.num_unjudged == 0


def test_a_round_worse_than_its_parent_is_told_and_a_small_difference_is_not(tmp_path):
    run = RunDir(tmp_path)
    for number, right in ((0, [True] * 40), (1, [True] * 38 + [False] * 2), (2, [False] * 30 + [True] * 10)):
        this = run.round(number)
        this.path.mkdir()
        answered = lines(["x"] * 40, right)
        for line, flag in zip(answered, right, strict=True):
            line.greedy.correct = flag
        write_jsonl(this.evaluation_lines, answered)
    assert worse_than_parent(run, 1) is None
    assert "round 2 is worse than round 1: right answers -70.0 points" in worse_than_parent(run, 2)


def test_a_run_ends_where_a_round_is_worse_if_told_so(tmp_path):
    asked = {"questions": "eval.jsonl", "max_new_tokens": 1, "kl": False}
    folder = make_project(tmp_path, evaluate=asked)
    write_lines(folder / "eval.jsonl", [{"id": f"q{n}", "question": f"{n}?", "answer": "x"} for n in range(80)])
    assert align(folder, "run", "--rounds", "1").returncode == 0
    run = RunDir(folder / "runs" / "run")
    for number, right in ((0, True), (1, False)):
        this = run.round(number)
        answered = read_jsonl(this.evaluation_lines, Evaluation)
        for line in answered:
            line.greedy.correct = line.sampled[0].correct = right
        write_jsonl(this.evaluation_lines, answered)
        # As if the stage had written them.
        entry = this.manifest.stage("evaluate")
        outputs = [this.path / name for name in entry.outputs]
        this.manifest.finish("evaluate", outputs=outputs, counts=entry.counts, notes=entry.notes)
    said = "WARNING: round 1 is worse than the first policy: right answers -100.0 points [-100.0, -100.0]"
    again = align(folder, "evaluate", "--round", "1")
    assert said in again.stderr
    assert again.returncode == 0
    result = align(folder, "run", "--set", "evaluate.stop_if_worse=true")
    assert result.returncode == 0, result.stderr
    # Where it happened, and at the end of all output.
    assert result.stderr.count(said) == 2
    assert "the run ended after round 1 of 2 (evaluate.stop_if_worse): the first policy is better" in result.stdout
    assert f"checkpoint: {folder / 'policy'}\n" in result.stdout
    assert not run.round(2).path.exists()
    assert run.report.is_file()


def in_round(run, number, answered, metrics=None):
    this = run.round(number)
    this.path.mkdir()
    write_jsonl(this.evaluation_lines, answered)
    this.evaluation.write_text(json.dumps({"round": 1, "questions": 40, "metrics": metrics or {}}))


def test_without_reference_answers_the_win_rate_against_the_parent_decides_and_no_other(tmp_path):
    run = RunDir(tmp_path)
    lost, won = {"mean": 0.3, "low": 0.2, "high": 0.4, "count": 40}, {"mean": 0.6, "low": 0.4, "high": 0.8, "count": 40}
    in_round(run, 0, lines(["x"] * 5))
    in_round(run, 1, lines(["x"] * 5), {"win_rate_initial": lost})
    in_round(run, 2, lines(["x"] * 5), {"win_rate_initial": lost, "win_rate_parent": won})
    in_round(run, 3, lines(["x"] * 5), {"win_rate_initial": lost})
    assert worse_than_parent(run, 1) == "round 1 is worse than the first policy: win rate 30.0% [20.0%, 40.0%]"
    assert worse_than_parent(run, 2) is None
    assert worse_than_parent(run, 3) is None


def test_without_answers_and_judge_naming_what_is_not_there_decides(tmp_path):
    run = RunDir(tmp_path)
    for number, named in ((0, []), (1, ["dog"])):
        answered = lines(["x"] * 20)
        for line in answered:
            line.question.absent_objects = ["dog"]
            line.sampled[0].absent_named = named
        in_round(run, number, answered)
    assert "responses that name what is not there +100.0 points" in worse_than_parent(run, 1)


def test_the_judge_reads_the_earlier_turns_of_a_dialogue():
    (line,) = lines(["x"])
    line.question.history = [Turn(role="user", content="<image>A dog?"), Turn(role="assistant", content="Yes.")]
    line.question.question = "And what colour?"
    assert _item(line, line).question == "user: A dog?\nassistant: Yes.\nAnd what colour?"
