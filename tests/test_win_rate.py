from align.config import load_config
from align.evaluate import worse_than_parent
from align.records import Evaluated, Evaluation, Question, write_jsonl
from align.rundir import RunDir
from align.win_rate import has_judge, summarise, win_rates
from tests.stage_runs import align, make_project


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
    forth = win_rates(config, one, {"initial": other})["initial"]
    back = win_rates(config, other, {"initial": one})["initial"]
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
    folder = make_project(tmp_path)
    assert align(folder, "sample").returncode == 0
    assert align(folder, "score").returncode == 0
    assert align(folder, "dpo").returncode == 0
    run = RunDir(folder / "runs" / "run")
    for number in (0, 1):
        assert align(folder, "evaluate", "--round", str(number)).returncode == 0
    right, wrong = lines(["x"] * 40, [True] * 40), lines(["x"] * 40, [False] * 40)
    for number, answered in ((0, right), (1, wrong)):
        for line in answered:
            line.greedy.correct = line.sampled[0].correct
        write_jsonl(run.round(number).evaluation_lines, answered)
    result = align(folder, "run", "--set", "evaluate.stop_if_worse=true")
    assert result.returncode == 0, result.stderr
    assert "WARNING: round 1 is worse than round 0" in result.stderr
    assert not run.round(2).path.exists()
    assert run.report.is_file()
