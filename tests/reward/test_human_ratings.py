"""People's preferences: as rewards, and their agreement with a critic and among each other, against tables by hand."""

from __future__ import annotations

import json
import math

import pytest

from reward.critics import Item, make_critic
from reward.critics.ratings import NOT_RATED, OTHER_RESPONSES
from reward.critics.scores import NOT_IN_FILE
from reward.errors import RewardError
from reward.human_ratings import HumanRating, agreement_of_people, agreement_with_people, cohens_kappa, read_ratings
from reward.judgement import Judgement

ITEM = Item("q1", "?", (), ("a", "b", "c", "d"))


def rating(responses, preferred, annotator="anna", question="q1", **more):
    return {"question_id": question, "responses": responses, "preferred": preferred, "annotator": annotator} | more


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_kappa_of_cohens_own_kind_of_table_is_as_by_hand():
    # 50 comparisons: both first 20, both second 15, one first other second 5, the reverse 10.
    # Observed 35/50; by chance 25/50 * 30/50 + 25/50 * 20/50 = 0.5; kappa 0.4.
    labels = [(1, 1)] * 20 + [(-1, -1)] * 15 + [(1, -1)] * 5 + [(-1, 1)] * 10
    found = cohens_kappa(labels)
    assert (found.kappa, found.agreed, found.count) == (pytest.approx(0.4), 35, 50)
    # Wilson's ends of 35 of 50 by hand: z^2 = 3.8415; centre (0.7 + 0.038415) / 1.07683, half by its formula.
    z2 = 3.841459
    centre = (0.7 + z2 / 100) / (1 + z2 / 50)
    half = math.sqrt(z2) / (1 + z2 / 50) * math.sqrt(0.7 * 0.3 / 50 + z2 / 10000)
    assert found.low == pytest.approx((centre - half - 0.5) / 0.5, abs=1e-6)
    assert found.high == pytest.approx((centre + half - 0.5) / 0.5, abs=1e-6)


def test_kappa_of_three_categories_counts_ties():
    # Rows anna: 1, 0, -1; columns ben: [[4, 1, 0], [1, 2, 1], [0, 0, 3]]. Observed 9/12.
    # Chance: (5*5 + 4*3 + 3*4) / 144 = 49/144; kappa (108 - 49) / (144 - 49) = 59/95.
    labels = [(1, 1)] * 4 + [(1, 0)] + [(0, 1)] + [(0, 0)] * 2 + [(0, -1)] + [(-1, -1)] * 3
    assert cohens_kappa(labels).kappa == pytest.approx(59 / 95)


def test_full_agreement_on_few_is_not_certain():
    found = cohens_kappa([(1, 1), (-1, -1)] * 4)
    assert found.kappa == found.high == 1.0
    assert found.low < 0.5


def test_opposite_and_empty_and_one_sided_raters():
    assert cohens_kappa([(1, -1), (-1, 1)]).kappa == -1.0
    assert cohens_kappa([]) is None
    always = cohens_kappa([(1, 1)] * 9)
    assert (always.kappa, always.agreed, always.count) == (None, 9, 9)


def test_people_are_compared_two_by_two_whichever_side_they_saw_first(tmp_path):
    lines = [rating([0, 1], 0), rating([2, 3], 3), rating([1, 2], None)]
    lines += [rating([1, 0], 0, "ben"), rating([3, 2], 2, "ben"), rating([0, 3], 0, "ben")]
    found = agreement_of_people(read_ratings_of(tmp_path, lines))
    # Both compared 0-1 (the same) and 2-3 (not): anna 1, -1; ben 1, 1. Chance: 1/2 * 1 + 1/2 * 0.
    assert set(found) == {"anna / ben"}
    assert (found["anna / ben"].kappa, found["anna / ben"].count) == (0.0, 2)


def read_ratings_of(tmp_path, lines):
    from pathlib import Path

    return read_ratings(Path(write(tmp_path / "ratings.jsonl", lines)))


def test_a_critic_is_compared_with_people_over_what_it_scored(tmp_path):
    critic = [
        Judgement(id="q2", rewards=[1.0, 0.0]),
        Judgement(id="q1", rewards=[2.0, 1.0, None, 1.0], unscored={2: "timeout"}),
    ]
    lines = [rating([1, 0], 0), rating([0, 3], 3), rating([0, 2], 0), rating([0, 1], 1, question="q2")]
    lines += [rating([0, 1], 0, question="unknown"), rating([0, 9], 0)]
    found = agreement_with_people(critic, read_ratings_of(tmp_path, lines))
    assert (found.agreed, found.count) == (1, 3)


def test_a_person_who_changed_their_mind_counts_once_with_the_last_word(tmp_path):
    found = read_ratings_of(tmp_path, [rating([0, 1], 0), rating([1, 0], 1), rating([0, 1], 0, "ben")])
    assert [(r.annotator, r.label) for r in found] == [("anna", -1), ("ben", 1)]


def test_ratings_become_rewards_and_what_nobody_rated_is_unscored(tmp_path):
    lines = [rating([0, 1], 0), rating([1, 0], 0, "ben"), rating([0, 3], None), rating([1, 3], 3)]
    file = write(tmp_path / "ratings.jsonl", lines)
    # 0 won twice and tied once; 1 lost three times; 3 won once.
    judgement, other = make_critic("ratings", {"file": file}).judge([ITEM, Item("q2", "?", (), ("a", "b"))])
    assert judgement.rewards == [2.0, -3.0, None, 1.0]
    assert judgement.unscored == {2: NOT_RATED}
    assert judgement.evidence == {"annotators": ["anna", "ben"]}
    assert other.rewards == [None, None]
    [fitted] = make_critic("ratings", {"file": file, "reward": "bradley_terry"}).judge([ITEM])
    assert fitted.rewards[0] > fitted.rewards[3] > fitted.rewards[1]


def test_ratings_of_other_samples_are_not_taken_for_these(tmp_path):
    shown = write(tmp_path / "shown.jsonl", [rating([0, 1], 0, texts=["a", "something else"])])
    beyond = write(tmp_path / "beyond.jsonl", [rating([0, 7], 0)])
    for file in (shown, beyond):
        [judgement] = make_critic("ratings", {"file": file}).judge([ITEM])
        assert set(judgement.unscored.values()) == {OTHER_RESPONSES}
    same = write(tmp_path / "same.jsonl", [rating([0, 1], 0, texts=["a ", "b"])])
    assert make_critic("ratings", {"file": same}).judge([ITEM])[0].rewards[:2] == [1.0, -1.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (rating([0, 0], 0), "two different indices"),
        (rating([0, 1], 2), "which is none of"),
        (rating([0, 1], 0) | {"annotator": ""}, "annotator"),
        (rating([0, 1], 0) | {"who": "anna"}, "who: Extra inputs"),
        ("[]", "not a valid HumanRating"),
        ("{", "not valid JSON"),
    ],
)
def test_a_line_that_is_no_rating_is_named_with_its_place(tmp_path, line, message):
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "ratings.jsonl").write_text(json.dumps(rating([0, 1], 0)) + "\n\n" + text + "\n")
    with pytest.raises(RewardError, match=rf"ratings\.jsonl:3: .*{message}"):
        make_critic("ratings", {"file": str(tmp_path / "ratings.jsonl")})


def test_a_rating_reads_as_a_verdict():
    verdict = HumanRating(**rating([2, 0], 0)).verdict()
    assert (verdict.first, verdict.second, verdict.p_first, verdict.p_second, verdict.winner) == (2, 0, 0.0, 1.0, 0)
    assert HumanRating(**rating([2, 0], None)).verdict().p_first == 0.5


def test_finished_scores_are_looked_up_by_question_and_merged_by_the_panels_rules(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"id": "q1", "rewards": [0.0, 2.0, 1.0, 1.0]}])
    unscored = {"id": "q1", "rewards": [10.0, None, 30.0, 20.0], "unscored": {"1": "timeout"}}
    two = write(tmp_path / "two.jsonl", [{"id": "q0", "rewards": [1.0]}, unscored])
    members = {"a": {"kind": "scores", "file": one}, "b": {"kind": "scores", "file": two}}
    panel = make_critic("panel", {"critics": members, "normalise": "range", "weights": {"b": 3.0}})
    judgement, short, missing = panel.judge([ITEM, Item("q0", "?", (), ("a", "b")), Item("q9", "?", (), ("a",))])
    # Without response 1: a is 0, 1, 1 and b 0, 1, 0.5; weighed 1 to 3.
    assert judgement.rewards == [0.0, None, 1.0, pytest.approx(0.625)]
    assert judgement.unscored == {1: "b: timeout"}
    assert "another number of responses" in short.unscored[0]
    assert missing.unscored == {0: f"a: {NOT_IN_FILE}; b: {NOT_IN_FILE}"}


def test_a_question_scored_twice_in_a_file_is_named(tmp_path):
    file = write(tmp_path / "one.jsonl", [{"id": "q1", "rewards": [0.0]}] * 2)
    with pytest.raises(RewardError, match=r"one\.jsonl:2: the question q1 is scored twice"):
        make_critic("scores", {"file": file})
