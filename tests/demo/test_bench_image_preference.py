"""The table of image-conditional preference, of made-up answers whose numbers are known."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_image_preference import ALONE, METRICS, NATS, Outcome, difference, held_out_values, mean_of, table

from align.records import Evaluated, Evaluation, OtherImageAnswer, Question, ResponseLogProbs, write_jsonl
from align.run.folder import RunDir


def test_a_rounds_files_give_every_metric_by_question(tmp_path):
    this = RunDir(tmp_path).round(1)
    this.path.mkdir(parents=True)
    question = Question(id="q", question="?", images=["a.png"], answer="x", absent_objects=["y"])
    right = Evaluated(text="x", num_tokens=1, correct=True)
    wrong = Evaluated(text="y", num_tokens=2, correct=False, absent_named=["y"])
    write_jsonl(this.evaluation_lines, [Evaluation(id="q", question=question, greedy=right, sampled=[right, wrong])])
    again = {"blank": wrong, "shuffled": right}
    write_jsonl(this.other_image_answers, [OtherImageAnswer(id=f"{k}:q", answer=v) for k, v in again.items()])
    log_probs = {"real:q": -1.0, "blank:q": -3.0, "shuffled:q": -1.5}
    write_jsonl(
        this.image_log_probs, [ResponseLogProbs(id=k, log_probs=[v], num_tokens=[2]) for k, v in log_probs.items()]
    )
    found = held_out_values(this)
    # Right in one of two; the answer changes without a picture, not with another; (3 - 1) / 2 and (1.5 - 1) / 2 nats.
    expected = ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.25])
    assert [found[metric]["q"] for metric in METRICS] == list(expected)


def outcome(*rights):
    return Outcome({metric: {f"q{n}": [right] for n, right in enumerate(rights)} for metric in METRICS})


def test_seeds_are_put_together_by_question_and_arms_held_against_dpo_alone():
    alone = {0: outcome(0.0, 1.0, 0.0, 0.0), 1: outcome(0.0, 0.0, 0.0, 0.0)}
    crop = {0: outcome(1.0, 1.0, 0.0, 0.0), 1: outcome(1.0, 1.0, 0.0, 1.0)}
    together = mean_of(list(crop.values()), METRICS[0])
    assert (together.mean, together.count) == (5 / 8, 4)
    apart = difference(list(alone.values()), list(crop.values()), METRICS[0])
    # By question 1, 1/2, 0 and 1/2 more: each seed and question counts once.
    assert (apart.mean, apart.count) == (pytest.approx(1 / 2), 4)
    assert apart.low > 0
    rows = [line.split(" | ") for line in table({("length", ALONE): alone, ("length", "crop"): crop}).splitlines()[2:]]
    assert [row[1:3] for row in rows if row[0] != "|"] == [
        [arm, seed] for arm in (ALONE, "crop") for seed in ("0", "1", "all")
    ]
    assert rows[3][3].startswith("50.0 [")
    assert rows[4][3].startswith("+25.0 [")
    assert rows[8][3 + METRICS.index(NATS)].startswith("+0.500 [")
