"""Reliability of a critic: every measure by hand, the two controls on critics built to fail them,
warnings and gates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reward.controls import blank_images, shuffle_images
from reward.critics.pairwise import PairwiseCritic
from reward.critics.panel import PanelCritic
from reward.critics.pointwise import PointwiseCritic
from reward.critics.random import RandomCritic
from reward.critics.verifier import VerifierCritic
from reward.errors import RewardError
from reward.intervals import clustered_share, wilson
from reward.judgement import Item, Judgement
from reward.reliability import (
    MEASURES,
    MIN_COUNT,
    PAIR_MEASURES,
    Figure,
    agreement,
    check_gates,
    failed_gates,
    image_dependence,
    length_correlation,
    measure,
    panel_agreement,
    position_bias,
    share,
)
from reward.warnings import critic_warnings
from tests.reward.judge_models import FunctionModel, QualityModel

# Pictures are words; a response is good as far as its letters are in the picture.
PICTURES = ["abcd", "efgh", "ijkl", "mnop"]
RESPONSES = ("abef", "ab", "ijmn", "mnop", "efgh")
ITEMS = [Item(f"q{place}", "Which letters?", (picture,), RESPONSES) for place, picture in enumerate(PICTURES)]


def judged_as(rewards, id_="q", **more):
    return Judgement(id=id_, rewards=rewards, **more)


def figure(value, count=100, **more):
    return Figure(value=value, count=count, questions=count, **more)


def seen(image: str, response: str) -> float:
    return float(sum(letter in image for letter in response))


def judged(judge_model, items):
    return PairwiseCritic(judge_model=judge_model, prompt="pairwise_short").judge(items)


def dependence(judge_model, control):
    real = {judgement.id: judgement for judgement in judged(judge_model, ITEMS)}
    return image_dependence([(real[shown.id], shown) for shown in judged(judge_model, control)])


BLANK = blank_images(ITEMS, lambda image: "")
SHUFFLED = shuffle_images(ITEMS)


def test_a_critic_that_looks_changes_its_mind_without_the_image():
    for control in (BLANK, SHUFFLED):
        found = dependence(QualityModel(seen), control)
        assert found.count == 4 * 20
        assert found.value > 0.3


def test_a_critic_that_ignores_the_image_is_caught_by_both_controls():
    blind = QualityModel(lambda image, response: float(len(response)))
    for control in (BLANK, SHUFFLED):
        assert dependence(blind, control).value == 0.0
    controls = {"blank": judged(blind, BLANK), "shuffled": judged(blind, SHUFFLED)}
    measures = measure(judged(blind, ITEMS), controls=controls)
    gates = {"min_image_dependence_blank": 0.1, "min_image_dependence_shuffled": 0.1, "max_position_bias": 0.3}
    assert [line.split()[0] for line in failed_gates(measures, gates)] == [
        "image_dependence_blank",
        "image_dependence_shuffled",
    ]


def test_a_critic_that_always_prefers_the_first_is_caught_by_its_bias_and_by_the_controls():
    first = QualityModel(lambda image, response: 0.0, lean=3.0)
    measures = measure(judged(first, ITEMS), controls={"blank": judged(first, BLANK)})
    assert measures["position_bias"].value == 1.0
    assert measures["consistency"].value == 0.0
    assert measures["image_dependence_blank"].value == 0.0
    assert len(failed_gates(measures, {"max_position_bias": 0.3, "min_consistency": 0.6})) == 2


def test_controls_work_on_ratings_too():
    def row(turn: str, judge_model=None) -> list[float]:
        return [math.log(0.5)] * 2 + [-math.inf] * 9

    flat = PointwiseCritic(judge_model=FunctionModel(row=row)).judge(ITEMS)
    assert image_dependence(zip(flat, flat, strict=True)) is None
    one = judged_as([3.0, 2.0, 1.0])
    # Of the pairs 0-1, 0-2, 1-2 the control turns the first round, keeps the second and ties the third.
    assert image_dependence([(one, judged_as([2.0, 3.0, 1.0]))]).value == pytest.approx(1 / 3)
    assert image_dependence([(one, judged_as([2.0, 2.0, 1.0]))]).value == pytest.approx(1 / 6)
    assert image_dependence([(one, one)]).value == 0.0


def test_shuffling_gives_every_item_anothers_images_and_leaves_out_whom_nobody_can_lend():
    items = [
        Item("two", "?", ("a", "b"), ()),
        Item("none", "?", (), ()),
        Item("one", "?", ("a",), ()),
        Item("same", "?", ("a",), ()),
        Item("other", "?", ("c",), ()),
    ]
    changed = shuffle_images(items)
    assert [item.id for item in changed] == ["one", "same", "other"]
    assert [item.images for item in changed] == [("c",), ("c",), ("a",)]
    assert [item.id for item in blank_images(items, lambda image: "")] == ["two", "one", "same", "other"]
    assert shuffle_images(items[:2]) == []


def test_length_correlation_is_taken_within_questions():
    # Within each question longer is worse; across questions longer answers have higher rewards.
    judgements = [judged_as([1.0, 2.0], "a"), judged_as([11.0, 12.0], "b")]
    found = length_correlation(judgements, {"a": [20, 10], "b": [120, 110]})
    assert found.value == pytest.approx(-1.0)
    assert (found.count, found.questions) == (4, 2)


def test_length_correlation_equals_numpys_on_one_question_and_fishers_interval_is_by_hand():
    draw = np.random.default_rng(0)
    rewards, lengths = draw.normal(size=40), draw.integers(1, 100, 40)
    found = length_correlation([judged_as(rewards.tolist())], {"q": lengths.tolist()})
    assert found.value == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])
    half = 1.959964 / math.sqrt(40 - 3)
    assert found.low == pytest.approx(math.tanh(math.atanh(found.value) - half), abs=1e-6)
    assert found.high == pytest.approx(math.tanh(math.atanh(found.value) + half), abs=1e-6)


def test_among_equally_right_responses_only_their_own_lengths_count():
    # Right answers are long and rewarded; among right ones and among wrong ones, shorter is better.
    judgements = [judged_as([9.0, 8.0, 2.0, 1.0])]
    lengths, right = {"q": [30, 40, 10, 20]}, {"q": judged_as([1.0, 1.0, 0.0, 0.0])}
    assert length_correlation(judgements, lengths).value > 0.5
    assert length_correlation(judgements, lengths, given=right).value == pytest.approx(-1.0)


def test_what_correctness_explains_is_no_correlation_with_length():
    # Rewards that follow from correctness but for rounding, and rewards that are all the
    # same (0.1 is no binary number).
    draw = np.random.default_rng(2)
    names = [f"q{number}" for number in range(500)]
    lengths = dict(zip(names, draw.integers(5, 200, (500, 5)).tolist(), strict=True))
    right = draw.integers(0, 2, (500, 5)).astype(float)
    critic = [judged_as(row, name) for name, row in zip(names, (0.7 * right + 0.1).tolist(), strict=True)]
    given = {name: judged_as(row) for name, row in zip(names, right.tolist(), strict=True)}
    assert length_correlation(critic, lengths, given=given) is None
    assert length_correlation([judged_as([0.1] * 5, name) for name in names], lengths) is None


def test_what_does_not_vary_has_no_correlation():
    assert length_correlation([judged_as([1.0, 1.0, 1.0])], {"q": [1, 2, 3]}) is None
    assert length_correlation([judged_as([1.0, 2.0])], {"q": [1, 2]}) is None
    one_missing = [judged_as([1.0, None, 2.0, 3.0], unscored={1: "x"})]
    assert length_correlation(one_missing, {"q": [1, 50, 2, 3]}).value == 1.0


def test_agreement_with_the_reference_counts_right_wrong_pairs():
    # Right-wrong pairs: 0-1 (critic right), 0-3 (critic tied), 2-1 (critic wrong), 2-3 (critic wrong).
    critic, reference = [2.0, 1.0, 0.5, 2.0], [1.0, 0.0, 1.0, 0.0]
    found = agreement([(critic, reference)])
    assert (found.count, found.value) == (4, pytest.approx(1.5 / 4))
    decided = agreement([(critic, reference)], ties=False)
    assert (decided.count, decided.value) == (3, pytest.approx(1 / 3))
    assert agreement([(critic, [1.0] * 4)]) is None


def test_random_preferences_agree_with_the_reference_by_half():
    items = [Item(f"q{n}", "?", (), ("1", "2", "3", "4"), answer="2") for n in range(400)]
    judged_twice = zip(RandomCritic().judge(items), VerifierCritic().judge(items), strict=True)
    found = agreement([(one.rewards, other.rewards) for one, other in judged_twice])
    assert found.count == 1200
    assert found.value == pytest.approx(0.5, abs=0.06)
    assert found.low < 0.5 < found.high


def test_critics_of_a_panel_are_compared_two_by_two():
    items = [Item(f"q{n}", "?", (), ("1", "2", "3"), answer="2") for n in range(5)]
    panel = PanelCritic(critics={"a": RandomCritic(seed=1), "b": RandomCritic(seed=1), "v": VerifierCritic()}).judge(
        items
    )
    found = panel_agreement(panel)
    assert set(found) == {"a / b", "a / v", "b / v"}
    assert found["a / b"].value == 1.0
    assert measure(panel)["agreement_between_critics"].value == min(figure.value for figure in found.values())


def test_what_cannot_be_measured_is_left_out():
    measures = measure([judged_as([None, 1.0], unscored={0: "x"})])
    assert {name: found.value for name, found in measures.items()} == {"unscored_rate": 0.5}
    assert measure([]) == {}


def test_judgements_are_joined_with_references_lengths_and_controls_by_question():
    items = [Item(f"q{n}", "?", (f"p{n}",), ("1", "22", "333"), answer="22") for n in range(6)]
    judgements = RandomCritic().judge(items)
    lengths = {item.id: [1, 2, 3] for item in items}
    reference = {judgement.id: judgement for judgement in VerifierCritic().judge(items)}
    controls = {"blank": RandomCritic(seed=5).judge(items[1:4])}
    found = measure(judgements, lengths=lengths, reference=reference, controls=controls)
    turned = measure(
        judgements[::-1], lengths=lengths, reference=reference, controls={"blank": controls["blank"][::-1]}
    )
    assert found == turned
    assert found["image_dependence_blank"].questions == 3


def test_nothing_of_seven_is_not_nothing():
    # Wilson's upper end for 0 of n is z^2 / (n + z^2): 3.8415 / 10.8415 by hand.
    found = share([(0, 1)] * 7)
    assert (found.value, found.low, found.count) == (0.0, 0.0, 7)
    assert found.high == pytest.approx(0.3543, abs=1e-4)
    assert position_bias([]) is None


def test_an_interval_over_questions_is_as_wide_as_their_number_allows():
    # Ten comparisons of a question that always say the same are worth one; independent ones are worth ten.
    alike = clustered_share([10, 0] * 10, [10] * 20)
    apart = clustered_share([5] * 10 + [4, 6] * 5, [10] * 20)
    once = wilson(10, 20)
    assert (alike.low, alike.high) == (pytest.approx(once.low, abs=0.01), pytest.approx(once.high, abs=0.01))
    assert apart.high - apart.low == pytest.approx(wilson(100, 200).high - wilson(100, 200).low, abs=1e-9)


def test_the_interval_of_a_share_covers_it_nineteen_times_of_twenty():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        # Questions differ: each has a rate of its own, on average 0.3, and six comparisons.
        rates = draw.beta(0.6, 1.4, size=40)
        found = clustered_share(draw.binomial(6, rates).tolist(), [6] * 40)
        covered += found.low <= 0.3 <= found.high
    assert 920 <= covered <= 985


def test_gates_hold_at_their_limit_and_fail_beyond_when_unmeasured_and_on_too_few():
    figures = {"tie_rate": figure(0.5), "consistency": figure(0.5)}
    assert failed_gates(figures, {"max_tie_rate": 0.5, "min_consistency": 0.5}) == []
    (line,) = failed_gates({"tie_rate": figure(0.6)}, {"max_tie_rate": 0.5})
    assert line == "tie_rate is 0.6 (100 verdicts), allowed at most 0.5"
    assert "could not be measured" in failed_gates({}, {"min_agreement_with_reference": 0.6})[0]
    (line,) = failed_gates({"consistency": figure(1.0, MIN_COUNT - 1)}, {"min_consistency": 0.5})
    assert "measured on 19 pairs judged in both orders only, too few (below 20)" in line


@pytest.mark.parametrize(
    "name", [name for name, known in (MEASURES | PAIR_MEASURES).items() if known.limit is not None]
)
def test_every_limit_warns_beyond_it_on_enough_comparisons_and_not_before(name):
    known = (MEASURES | PAIR_MEASURES)[name]
    step = -0.01 if known.bad == "low" else 0.01
    beyond, within = figure(known.limit + step), figure(known.limit - step)
    few = figure(known.limit + step, MIN_COUNT - 1)
    assert known.is_beyond(beyond)
    assert not known.is_beyond(within)
    assert not known.is_beyond(few)
    told_by_another = name.startswith("image_dependence_")
    assert len(critic_warnings({name: beyond})) == (0 if told_by_another else 1)
    assert critic_warnings({name: within}) == critic_warnings({name: few}) == []


def test_a_critic_with_a_position_bias_of_a_third_is_warned_about_when_it_scores():
    (warned,) = critic_warnings({"position_bias": figure(-0.3, low=-0.4, high=-0.2)})
    assert warned.title == "The critic prefers the response shown second"
    assert warned.finding == "Position bias -0.30 (95 % interval -0.40 to -0.20, 100 pairs judged in both orders)."
    assert not warned.serious


def test_a_warning_is_serious_where_the_whole_interval_is_beyond():
    assert critic_warnings({"consistency": figure(0.4, low=0.3, high=0.49)})[0].serious
    assert not critic_warnings({"consistency": figure(0.4, low=0.3, high=0.51)})[0].serious


def test_length_is_warned_about_once_and_by_equals_where_they_are_known():
    both = {"length_correlation": figure(0.9), "length_correlation_given_reference": figure(0.1)}
    assert critic_warnings(both) == []
    assert critic_warnings({"length_correlation": figure(-0.9)})[0].title == "The critic likes shorter responses"


def test_an_unknown_gate_is_named_with_its_neighbour():
    with pytest.raises(RewardError, match=r"'max_positon_bias' \(did you mean max_position_bias\?\)"):
        check_gates({"max_positon_bias": 0.1})
    check_gates({f"min_{name}": 0.0 for name in MEASURES})
