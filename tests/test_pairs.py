"""From scores to a round's pairs: truncated and empty responses, length balance, and pairs of earlier rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import UserError
from align.records import Pair, Question, Response, Samples, read_jsonl, write_jsonl
from align.run.folder import RunDir
from align.stages.pairs import make_pairs, pair_figures, run_pairs
from reward.judgement import Judgement
from reward.pairs import PairSettings
from tests.critic_runs import config_of


def sampled(name, *lengths, reasons=None):
    reasons = reasons or ["stop"] * len(lengths)
    responses = [
        Response(text=f"{name} {n}" * bool(n), num_tokens=n, finish_reason=r)
        for n, r in zip(lengths, reasons, strict=True)
    ]
    return Samples(id=name, question=Question(id=name, question="What?"), responses=responses, seed=0)


def write_scored(folder: Path, number: int, samples: list[Samples], rewards: list[list[float]]) -> None:
    """A round as it is after scoring."""
    this = RunDir(folder / "runs/run").round(number)
    this.path.mkdir(parents=True)
    write_jsonl(this.samples, samples)
    write_jsonl(this.scores, [Judgement(id=s.id, rewards=r) for s, r in zip(samples, rewards, strict=True)])
    for stage, output in (("sample", this.samples), ("score", this.scores)):
        this.manifest.begin(stage, settings={}, inputs={})
        this.manifest.finish(
            stage,
            outputs=[output],
            counts={"critic": {"position_bias": {"value": 0.4, "count": 40, "questions": 4}}},
            seconds=0.0,
        )


def pairs_of(folder: Path, number: int, **settings) -> list[Pair]:
    config = config_of(folder, pairs=settings, rounds=3, critic={"kind": "random"})
    run_pairs(config, number)
    return read_jsonl(RunDir(folder / "runs/run").round(number).pairs, Pair)


def counts_of(folder: Path, number: int) -> dict:
    return RunDir(folder / "runs/run").round(number).manifest.stage("pairs").counts


def test_truncated_and_empty_responses_stay_out_and_are_counted():
    line = sampled("q", 5, 0, 9, 7, reasons=["stop", "stop", "length", "stop"])
    scores = [Judgement(id="q", rewards=[1.0, 9.0, 8.0, 0.0])]
    made = make_pairs([line], scores, PairSettings(), 1, where="here")
    assert [(one.pair.responses["chosen"], one.pair.responses["rejected"]) for one in made.pairs] == [(0, 3)]
    assert made.counts["dropped_responses"] == {"empty response": 1, "truncated": 1}
    kept = make_pairs([line], scores, PairSettings(keep_truncated=True), 1, where="here")
    assert kept.pairs[0].pair.responses == {"chosen": 2, "rejected": 3}


def test_lengths_are_balanced_in_tokens_over_all_questions(tmp_path):
    # log ratios of chosen to rejected: log 4, log 2, log 1/2; without the first they cancel.
    samples = [sampled("a", 40, 10), sampled("b", 20, 10), sampled("c", 10, 20)]
    write_scored(tmp_path, 1, samples, [[1.0, 0.0]] * 3)
    assert [pair.question_id for pair in pairs_of(tmp_path, 1, balance_lengths=0.1)] == ["b", "c"]
    counts = counts_of(tmp_path, 1)
    assert counts["dropped_pairs"] == {"dropped to balance lengths": 1}
    assert counts["mean_log_length_ratio"] == pytest.approx(0.4621, abs=1e-4)  # log(4) / 3
    assert counts["mean_log_length_ratio_balanced"] == 0.0


def test_the_hardest_pairs_of_earlier_rounds_make_up_the_share_asked_for(tmp_path):
    first = [sampled(f"a{n}", 5, 6) for n in range(4)]
    write_scored(tmp_path, 1, first, [[4.0, 0.0], [1.0, 0.0], [8.0, 0.0], [2.0, 0.0]])
    pairs_of(tmp_path, 1, replay_fraction=0.25)
    write_scored(tmp_path, 2, [sampled(f"b{n}", 5, 6) for n in range(6)], [[3.0, 0.0]] * 6)
    pairs = pairs_of(tmp_path, 2, replay_fraction=0.25)
    # 6 new ones and 2 old ones: a quarter of 8. The smallest margins of round 1 are those of a1 and a3.
    assert [pair.question_id for pair in pairs[6:]] == ["a1", "a3"]
    assert [pair.meta.get("from_round") for pair in pairs] == [None] * 6 + [1, 1]
    assert all(not pair.responses for pair in pairs[6:])
    assert (counts_of(tmp_path, 2)["pairs"], counts_of(tmp_path, 2)["replayed_pairs"]) == (8, 2)


def test_a_pair_that_was_mixed_in_once_is_not_an_own_pair_of_that_round(tmp_path):
    write_scored(tmp_path, 1, [sampled("a", 5, 6)], [[4.0, 0.0]])
    pairs_of(tmp_path, 1, replay_fraction=0.5)
    write_scored(tmp_path, 2, [sampled("b", 5, 6)], [[4.0, 0.0]])
    assert len(pairs_of(tmp_path, 2, replay_fraction=0.5)) == 2
    write_scored(tmp_path, 3, [sampled("c", 5, 6), sampled("d", 5, 6)], [[4.0, 0.0]] * 2)
    assert [pair.question_id for pair in pairs_of(tmp_path, 3, replay_fraction=0.5)] == ["c", "d", "a", "b"]


def test_mixing_needs_the_pairs_of_every_earlier_round(tmp_path):
    write_scored(tmp_path, 2, [sampled("b", 5, 6)], [[4.0, 0.0]])
    with pytest.raises(
        UserError, match="round 1 has no complete pairs stage, and pairs of earlier rounds are replayed"
    ):
        pairs_of(tmp_path, 2, replay_fraction=0.2)


STRATEGIES = {
    "best_worst": [(0, 3)],
    "topk_bottomk": [(0, 3), (0, 2), (1, 3), (1, 2)],
    "all_above_margin": [(0, 3), (0, 2), (1, 3), (0, 1), (1, 2), (2, 3)],
    "closest_above_margin": [(2, 3), (1, 2), (0, 1), (1, 3), (0, 2), (0, 3)],
    "correct_incorrect": [(0, 2), (1, 3), (0, 3), (1, 2)],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_chosen_in_the_configuration(tmp_path, strategy):
    # Differences: 0-1 2.5, 1-2 2, 2-3 1; for correct_incorrect, rewards from 0.5 count as correct.
    write_scored(tmp_path, 1, [sampled("q", 5, 6, 7, 8)], [[5.0, 2.5, 0.4, -0.5]])
    found = pairs_of(tmp_path, 1, strategy=strategy, max_per_question=9)
    order = [(pair.responses["chosen"], pair.responses["rejected"]) for pair in found]
    assert order == STRATEGIES[strategy]


def test_no_pair_has_a_chosen_reward_below_its_rejected_one(tmp_path):
    write_scored(tmp_path, 1, [sampled("q", 5, 6, 7), sampled("r", 5, 6, 7)], [[1.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    found = pairs_of(tmp_path, 1, strategy="all_above_margin", max_per_question=9)
    assert all(pair.rewards["chosen"] > pair.rewards["rejected"] for pair in found)
    assert counts_of(tmp_path, 1)["questions_without_pair"] == {"all rewards tied": 1}


def test_gates_hold_for_pairs_too(tmp_path):
    write_scored(tmp_path, 1, [sampled("q", 5, 6)], [[1.0, 0.0]])
    config = config_of(tmp_path, critic={"kind": "random", "gates": {"max_position_bias": 0.3}}, rounds=3)
    with pytest.raises(UserError, match=r"position_bias is 0.4.*--set critic.gates={}"):
        run_pairs(config, 1)
    assert not RunDir(tmp_path / "runs/run").round(1).pairs.exists()


def test_pairs_are_held_against_reference_answers_and_lengths():
    # Right over wrong twice, wrong over right once, both wrong once; the chosen one is longer in three of four.
    rows = {"a": ("7", "8", 5, 3), "b": ("7", "9", 4, 2), "c": ("8", "7", 6, 1), "d": ("8", "9", 1, 2)}
    samples = [
        Samples(
            id=name,
            question=Question(id=name, question="How many?", answer="7"),
            responses=[Response(text=first, num_tokens=one), Response(text=second, num_tokens=two)],
            seed=0,
        )
        for name, (first, second, one, two) in rows.items()
    ]
    scores = [Judgement(id=name, rewards=[1.0, 0.0]) for name in rows]
    figures = pair_figures(make_pairs(samples, scores, PairSettings(), 1, where="here"))
    agree, longer = figures["pairs_agree_with_reference"], figures["chosen_longer"]
    assert (agree.value, agree.count) == (pytest.approx(2 / 3), 3)
    assert (longer.value, longer.count) == (0.75, 4)
