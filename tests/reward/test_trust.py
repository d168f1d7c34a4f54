"""Trust in a critic: every measure by hand, the two controls on critics built to fail them, and gates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reward.critics.pairwise import PairwiseCritic
from reward.critics.panel import PanelCritic
from reward.critics.pointwise import PointwiseCritic
from reward.critics.random import RandomCritic
from reward.critics.verifier import VerifierCritic
from reward.errors import RewardError
from reward.judgement import Item, Judgement
from reward.reliability import (
    MEASURES,
    Agreement,
    agreement,
    blank_images,
    check_gates,
    failed_gates,
    image_dependence,
    length_correlation,
    measure_trust,
    panel_agreement,
    shuffle_images,
)
from tests.reward.judge_models import FunctionModel, QualityModel

# Pictures are words; a response is good as far as its letters are in the picture.
PICTURES = ["abcd", "efgh", "ijkl", "mnop"]
RESPONSES = ("abef", "ab", "ijmn", "mnop", "efgh")
ITEMS = [Item(f"q{place}", "Which letters?", (picture,), RESPONSES) for place, picture in enumerate(PICTURES)]


def judged_as(rewards, **more):
    return Judgement(id="q", rewards=rewards, **more)


def seen(image: str, response: str) -> float:
    return float(sum(letter in image for letter in response))


def judged(judge_model, items):
    return PairwiseCritic(judge_model, prompt="pairwise_short").judge(items)


def dependence(judge_model, control):
    real = judged(judge_model, ITEMS)
    return image_dependence([real[place] for place in control.places], judged(judge_model, control.items))


BLANK = blank_images(ITEMS, lambda image: "")
SHUFFLED = shuffle_images(ITEMS)


def test_a_critic_that_looks_changes_its_mind_without_the_image():
    for control in (BLANK, SHUFFLED):
        found = dependence(QualityModel(seen), control)
        assert found.num_compared == 4 * 20
        assert found.changed > 0.3


def test_a_critic_that_ignores_the_image_is_caught_by_both_controls():
    blind = QualityModel(lambda image, response: float(len(response)))
    for control in (BLANK, SHUFFLED):
        assert dependence(blind, control).changed == 0.0
    measures = measure_trust(judged(blind, ITEMS), blank=dependence(blind, BLANK), shuffled=dependence(blind, SHUFFLED))
    gates = {"min_image_dependence_blank": 0.1, "min_image_dependence_shuffled": 0.1, "max_position_bias": 0.3}
    assert [line.split()[0] for line in failed_gates(measures, gates)] == [
        "image_dependence_blank",
        "image_dependence_shuffled",
    ]


def test_a_critic_that_always_prefers_the_first_is_caught_by_its_bias_and_by_the_controls():
    first = QualityModel(lambda image, response: 0.0, lean=3.0)
    measures = measure_trust(judged(first, ITEMS), blank=dependence(first, BLANK))
    assert measures["position_bias"] == 1.0
    assert measures["consistency"] == 0.0
    assert measures["image_dependence_blank"] == 0.0
    assert len(failed_gates(measures, {"max_position_bias": 0.3, "min_consistency": 0.6})) == 2


def test_controls_work_on_ratings_too():
    def row(turn: str, judge_model=None) -> list[float]:
        return [math.log(0.5)] * 2 + [-math.inf] * 9

    flat = PointwiseCritic(FunctionModel(row=row)).judge(ITEMS)
    assert image_dependence(flat, flat) is None
    one = [judged_as([3.0, 2.0, 1.0])]
    # Of the pairs 0-1, 0-2, 1-2 the control turns the first round, keeps the second and ties the third.
    assert image_dependence(one, [judged_as([2.0, 3.0, 1.0])]).changed == pytest.approx(1 / 3)
    assert image_dependence(one, [judged_as([2.0, 2.0, 1.0])]).changed == pytest.approx(1 / 6)
    assert image_dependence(one, one).changed == 0.0


def test_shuffling_gives_every_item_anothers_images_and_leaves_out_whom_nobody_can_lend():
    items = [
        Item("two", "?", ("a", "b"), ()),
        Item("none", "?", (), ()),
        Item("one", "?", ("a",), ()),
        Item("same", "?", ("a",), ()),
        Item("other", "?", ("c",), ()),
    ]
    control = shuffle_images(items)
    assert control.places == [2, 3, 4]
    assert [item.images for item in control.items] == [("c",), ("c",), ("a",)]
    assert blank_images(items, lambda image: "").places == [0, 2, 3, 4]
    assert shuffle_images(items[:2]).items == []


def test_length_correlation_is_taken_within_questions():
    # Within each question longer is worse; across questions longer answers have higher rewards.
    judgements = [judged_as([1.0, 2.0]), judged_as([11.0, 12.0])]
    lengths = [[20, 10], [120, 110]]
    assert length_correlation(judgements, lengths) == pytest.approx(-1.0)


def test_length_correlation_equals_numpys_on_one_question():
    draw = np.random.default_rng(0)
    rewards, lengths = draw.normal(size=40), draw.integers(1, 100, 40)
    found = length_correlation([judged_as(rewards.tolist())], [lengths.tolist()])
    assert found == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])


def test_the_partial_correlation_follows_its_formula():
    draw = np.random.default_rng(1)
    correct = draw.integers(0, 2, 60).astype(float)
    lengths = 50 + 20 * correct + draw.integers(-10, 11, 60)
    rewards = 3 * correct + 0.01 * lengths + draw.normal(size=60)
    found = length_correlation([judged_as(rewards.tolist())], [lengths.tolist()], given=[judged_as(correct.tolist())])
    r = np.corrcoef([rewards, lengths, correct])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert found == pytest.approx(expected)
    assert abs(found) < length_correlation([judged_as(rewards.tolist())], [lengths.tolist()])


def test_what_correctness_explains_is_no_correlation_with_length():
    # Rewards that follow from correctness but for rounding, and rewards that are all the same (0.1 is no binary number).
    draw = np.random.default_rng(2)
    lengths = draw.integers(5, 200, (500, 5)).tolist()
    right = draw.integers(0, 2, (500, 5)).astype(float)
    critic = [judged_as(row) for row in (0.7 * right + 0.1).tolist()]
    assert length_correlation(critic, lengths, given=[judged_as(row) for row in right.tolist()]) is None
    assert length_correlation([judged_as([0.1] * 3)] * 500, [row[:3] for row in lengths]) is None


def test_what_does_not_vary_has_no_correlation():
    assert length_correlation([judged_as([1.0, 1.0, 1.0])], [[1, 2, 3]]) is None
    assert length_correlation([judged_as([1.0, 2.0])], [[1, 2]]) is None
    assert length_correlation([judged_as([1.0, None, 2.0, 3.0], unscored={1: "x"})], [[1, 50, 2, 3]]) == 1.0


def test_agreement_with_the_reference_counts_right_wrong_pairs():
    # Right-wrong pairs: 0-1 (critic right), 0-3 (critic tied), 2-1 (critic wrong), 2-3 (critic wrong).
    critic = [judged_as([2.0, 1.0, 0.5, 2.0])]
    reference = [judged_as([1.0, 0.0, 1.0, 0.0])]
    found = agreement(critic, reference)
    assert found == Agreement(4, 1, 1)
    assert found.rate == pytest.approx(1.5 / 4)
    assert found.rate_when_decided == pytest.approx(1 / 3)
    assert agreement(critic, [judged_as([1.0] * 4)]).rate is None


def test_random_preferences_agree_with_the_reference_by_half():
    items = [Item(f"q{n}", "?", (), ("1", "2", "3", "4"), answer="2") for n in range(400)]
    found = agreement(RandomCritic().judge(items), VerifierCritic().judge(items))
    assert found.num_pairs == 1200
    assert found.rate == pytest.approx(0.5, abs=0.06)


def test_critics_of_a_panel_are_compared_two_by_two():
    items = [Item(f"q{n}", "?", (), ("1", "2", "3"), answer="2") for n in range(5)]
    panel = PanelCritic({"a": RandomCritic(seed=1), "b": RandomCritic(seed=1), "v": VerifierCritic()}).judge(items)
    found = panel_agreement(panel)
    assert set(found) == {"a / b", "a / v", "b / v"}
    assert found["a / b"].rate_when_decided == 1.0
    assert measure_trust(panel)["agreement_between_critics"] == min(f.rate_when_decided for f in found.values())


def test_what_cannot_be_measured_is_none():
    measures = measure_trust([judged_as([None, 1.0], unscored={0: "x"})])
    assert measures.pop("unscored_rate") == 0.5
    assert set(measures.values()) == {None}
    assert set(measures) | {"unscored_rate"} == set(MEASURES)
    assert measure_trust([])["unscored_rate"] is None


def test_gates_hold_at_their_limit_and_fail_beyond_and_when_unmeasured():
    assert failed_gates({"tie_rate": 0.5, "consistency": 0.5}, {"max_tie_rate": 0.5, "min_consistency": 0.5}) == []
    assert failed_gates({"tie_rate": 0.6}, {"max_tie_rate": 0.5}) == ["tie_rate is 0.6, allowed at most 0.5"]
    assert "could not be measured" in failed_gates({}, {"min_agreement_with_reference": 0.6})[0]


def test_an_unknown_gate_is_named_with_its_neighbour():
    with pytest.raises(RewardError, match=r"'max_positon_bias' \(did you mean max_position_bias\?\)"):
        check_gates({"max_positon_bias": 0.1})
    check_gates({f"min_{name}": 0.0 for name in MEASURES})
