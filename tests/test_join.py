"""Samples and scores are joined by id: whatever people do to the two files, pairs are right or there is one message."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from align.errors import UserError
from align.records import Pair, Question, Response, Samples, read_jsonl, to_line
from align.run.folder import RunDir
from align.stages.pairs import make_pairs, run_pairs
from reward.judgement import Judgement, Verdict
from reward.pairs import PairSettings
from tests.critic_runs import config_of
from tests.test_pairs import write_scored

NUM, K = 12, 4


def the_round(rng: random.Random) -> tuple[list[Samples], list[Judgement]]:
    """Questions whose best response says 'good' and whose worst says 'bad', each at a place of its own."""
    samples, scores = [], []
    for number in range(NUM):
        rewards = rng.sample([0.0, 1.0, 3.0, 4.0], K)
        names = {4.0: "good", 0.0: "bad"}
        texts = [f"{names.get(reward, 'middling')} {number} {place}" for place, reward in enumerate(rewards)]
        responses = [Response(text=text, num_tokens=5) for text in texts]
        samples.append(Samples(id=f"q{number}", question=Question(id=f"q{number}", question="?"), responses=responses, seed=0))  # fmt: skip
        verdict = Verdict(first=0, second=1, p_first=0.9, p_second=0.1, winner=0)
        scores.append(Judgement(id=f"q{number}", rewards=rewards, verdicts=[verdict]))
    return samples, scores


def texts_of(pair: Pair) -> tuple[str, str]:
    return tuple(side[0]["content"][0]["text"] for side in (pair.chosen, pair.rejected))  # type: ignore[return-value]


def pairs_of(samples: list[Samples], scores: list[Judgement]) -> tuple[list[Pair], dict[str, Any]]:
    made = make_pairs(samples, scores, PairSettings(), 1, where="-")
    return [one.pair for one in made.pairs], made.counts


@pytest.mark.parametrize("seed", range(200))
def test_any_order_and_any_filter_of_either_file_gives_the_same_pairs(seed):
    rng = random.Random(seed)
    samples, scores = the_round(rng)
    expected = {pair.question_id: texts_of(pair) for pair in pairs_of(samples, scores)[0]}  # fmt: skip
    assert all(chosen.startswith("good") and rejected.startswith("bad") for chosen, rejected in expected.values())
    kept_samples = rng.sample(samples, rng.randint(0, NUM))
    kept_scores = rng.sample(scores, rng.randint(0, NUM))
    pairs, counts = pairs_of(kept_samples, kept_scores)
    both = [line.id for line in kept_samples if line.id in {score.id for score in kept_scores}]
    assert {pair.question_id: texts_of(pair) for pair in pairs} == {id_: expected[id_] for id_ in both}
    assert [pair.question_id for pair in pairs] == both
    without = counts["questions_without_pair"].get("no line in the scores", 0)
    assert without == len(kept_samples) - len(both)
    assert counts.get("scores_without_samples", 0) == len(kept_scores) - len(both)


@pytest.mark.parametrize("file", ["samples", "scores"])
def test_a_question_that_is_there_twice_is_named(file):
    samples, scores = the_round(random.Random(0))
    lines = {"samples": samples, "scores": scores}
    lines[file] = [*lines[file], lines[file][3]]
    with pytest.raises(UserError, match=r"here: the question q3 is (sampled|scored) twice; remove one"):
        make_pairs(lines["samples"], lines["scores"], PairSettings(), 1, where="here")


def test_too_few_rewards_in_a_line_are_told_with_question_and_numbers():
    samples, scores = the_round(random.Random(0))
    scores[5] = Judgement(id="q5", rewards=[1.0, 0.0, 2.0])
    with pytest.raises(UserError, match="q5 has 4 responses in its samples and 3 rewards in its scores; take its line"):
        make_pairs(samples, scores, PairSettings(), 1, where="here")
    scores[5] = Judgement(id="q5", rewards=[1.0, 0.0, 2.0, 1.0], evidence={"correct": [True]})
    with pytest.raises(UserError, match=r"1 values of evidence\.correct"):
        make_pairs(samples, scores, PairSettings(), 1, where="here")


def test_files_reversed_by_hand_give_the_best_against_the_worst(tmp_path):
    samples, scores = the_round(random.Random(1))
    write_scored(tmp_path, 1, samples, [score.rewards for score in scores])
    this = RunDir(tmp_path / "runs/run").round(1)
    this.scores.write_text("".join(reversed(this.scores.read_text().splitlines(keepends=True))))
    run_pairs(config_of(tmp_path, critic={"kind": "random"}), 1)
    found = [texts_of(pair) for pair in read_jsonl(this.pairs, Pair)]
    assert len(found) == NUM
    assert all(chosen.startswith("good") and rejected.startswith("bad") for chosen, rejected in found)


def test_scores_of_other_questions_leave_no_pair_and_say_so(tmp_path):
    samples, scores = the_round(random.Random(1))
    write_scored(tmp_path, 1, samples, [score.rewards for score in scores])
    this = RunDir(tmp_path / "runs/run").round(1)
    this.scores.write_text(this.scores.read_text().replace('"q', '"other'))
    with pytest.raises(
        UserError, match=r"no line in the scores \(12\); judge the samples again: align score --round 1 --redo$"
    ):
        run_pairs(config_of(tmp_path, critic={"kind": "random"}), 1)


BROKEN = {
    "a reward that is missing without a reason": ({"rewards": [1.0, None, 0.0, 2.0]}, r"no reward for \[1\]"),
    "a reward with a reason": ({"unscored": {"0": "no answer"}}, r"unscored are \[0\]"),
    "a reward that is not finite": ({"rewards": [1.0, float("nan"), 0.0, 2.0]}, "rewards.1"),
    "a verdict on nobody": ({"verdicts": [{"first": 0, "second": 9, "p_first": 1, "p_second": 0}]}, "beyond the 4"),
    "a winner who did not play": (
        {"verdicts": [{"first": 0, "second": 1, "p_first": 1, "p_second": 0, "winner": 2}]},
        "with the winner 2",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_line_that_contradicts_itself_is_named_with_file_and_line(tmp_path, fault):
    samples, scores = the_round(random.Random(2))
    write_scored(tmp_path, 1, samples, [score.rewards for score in scores])
    this = RunDir(tmp_path / "runs/run").round(1)
    changes, message = BROKEN[fault]
    lines = [to_line(score) for score in scores]
    lines[2] = json.dumps(json.loads(lines[2]) | changes)
    this.scores.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"scores\.jsonl:3: not a valid Judgement.*{message}"):
        run_pairs(config_of(tmp_path, critic={"kind": "random"}), 1)


@pytest.mark.parametrize("correct", [["yes", True, False, None], "yes", {"0": True}, [0.5, 1, 0, 1]])
def test_correctness_that_is_none_is_told_and_the_advice_names_the_round(correct):
    samples, scores = the_round(random.Random(0))
    scores[5] = Judgement(id="q5", rewards=[1.0, 0.0, 2.0, 3.0], evidence={"correct": correct})
    with pytest.raises(UserError, match=r"evidence\.correct.*take its line out .*align score --round 3 --redo$"):
        make_pairs(samples, scores, PairSettings(), 3, where="here")
