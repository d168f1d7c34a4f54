"""Win minus loss and Bradley-Terry against tables worked out by hand, and against their own symmetries."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.judgement import Verdict
from reward.ranking import bradley_terry, score_of, win_minus_loss, without_failures
from reward.reliability import consistency, position_bias, tie_rate


def verdict(first: int, second: int, winner: int | None, p_first: float | None = None) -> Verdict:
    p = p_first if p_first is not None else {first: 1.0, second: 0.0, None: 0.5}[winner]
    return Verdict(first=first, second=second, p_first=p, p_second=1 - p, winner=winner)


# Three responses, all six ordered comparisons:
#   shown (0,1): 0 wins   shown (1,0): 0 wins   -> 0 beats 1 twice
#   shown (0,2): 0 wins   shown (2,0): 2 wins   -> one each (the critic took the first both times)
#   shown (1,2): tie      shown (2,1): 2 wins   -> 2 beats 1 once
# wins - losses: 0: 3 - 1 = 2;  1: 0 - 3 = -3;  2: 2 - 1 = 1
TABLE = [
    verdict(0, 1, 0),
    verdict(1, 0, 0),
    verdict(0, 2, 0),
    verdict(2, 0, 2),
    verdict(1, 2, None),
    verdict(2, 1, 2),
]


def test_win_minus_loss_of_the_table_is_what_one_counts_by_hand():
    assert win_minus_loss(3, TABLE) == [2.0, -3.0, 1.0]


def test_soft_verdicts_count_by_how_sure_the_critic_was():
    # (0,1): 0.9 - 0.1 = 0.8 for 0.  (1,0): p_first 0.4, so 1 gains -0.2 and 0 gains 0.2.
    verdicts = [verdict(0, 1, 0, 0.9), verdict(1, 0, 0, 0.4)]
    assert win_minus_loss(2, verdicts, soft=True) == pytest.approx([1.0, -1.0])


def test_always_preferring_the_first_gives_everyone_nothing():
    verdicts = [verdict(i, j, i) for i, j in permutations(range(5), 2)]
    assert win_minus_loss(5, verdicts) == [0.0] * 5


def test_five_responses_in_a_clear_order_get_the_papers_rewards():
    # All 20 ordered pairs of K = 5: the best wins 8 of its 8 comparisons, the next 6 and loses 2, ...
    verdicts = [verdict(i, j, min(i, j)) for i, j in permutations(range(5), 2)]
    assert win_minus_loss(5, verdicts) == [8.0, 4.0, 0.0, -4.0, -8.0]


def test_a_tournament_is_scaled_as_if_all_had_met():
    # Only 0-1 and 0-2 were played, both orders: 0 won all 4, full number is 2 * (3 - 1) = 4; 1 lost both of its 2.
    verdicts = [verdict(0, 1, 0), verdict(1, 0, 0), verdict(0, 2, 0), verdict(2, 0, 0)]
    assert win_minus_loss(3, verdicts, scale_to_all=True) == [4.0, -4.0, -4.0]
    assert win_minus_loss(3, TABLE, scale_to_all=True) == win_minus_loss(3, TABLE)


def test_bradley_terry_of_two_is_the_log_odds_with_its_textbook_error():
    # 0 wins 3 of 4. Without prior: s0 - s1 = ln 3, information of the difference = n p (1 - p) = 4 * 3/16 = 0.75.
    # Strengths are +-ln(3)/2, each with half the error of the difference.
    verdicts = [verdict(0, 1, 0), verdict(1, 0, 0), verdict(0, 1, 0), verdict(1, 0, 1)]
    fit = bradley_terry(2, verdicts, ridge=1e-9)
    assert fit.strengths == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-6)
    assert fit.standard_errors == pytest.approx([math.sqrt(1 / 0.75) / 2] * 2, abs=1e-6)


def test_bradley_terry_of_two_with_a_prior_solves_its_equation():
    # One response wins 2 of 2. With s0 = -s1 = s the slope is 2 (1 - sigmoid(2 s)) - ridge * s = 0; ridge 0.5:
    fit = bradley_terry(2, [verdict(0, 1, 0), verdict(1, 0, 0)], ridge=0.5)
    s = fit.strengths[0]
    assert 2 * (1 - 1 / (1 + math.exp(-2 * s))) == pytest.approx(0.5 * s, abs=1e-8)
    assert 0 < s < 2
    assert fit.strengths[1] == pytest.approx(-s)


def test_bradley_terry_equals_the_classic_iteration():
    # An independent algorithm: Zermelo's (minorise-maximise) on strengths w, without prior.
    wins = np.array([[0, 3, 4, 2], [1, 0, 3, 3], [2, 1, 0, 4], [1, 2, 1, 0]], dtype=float)
    verdicts = [verdict(i, j, i) for i in range(4) for j in range(4) for _ in range(int(wins[i, j]))]
    weights = np.ones(4)
    for _ in range(5000):
        games = wins + wins.T
        weights = wins.sum(axis=1) / (games / (weights[:, None] + weights[None, :])).sum(axis=1)
        weights /= np.exp(np.log(weights).mean())
    assert bradley_terry(4, verdicts, ridge=1e-9).strengths == pytest.approx(np.log(weights).tolist(), abs=1e-6)


def test_an_unbeaten_response_stays_finite_and_an_unseen_one_is_the_most_uncertain():
    fit = bradley_terry(4, [verdict(0, 1, 0), verdict(1, 0, 0), verdict(1, 2, 1), verdict(2, 1, 1)])
    assert fit.strengths[0] > fit.strengths[1] > fit.strengths[2]
    assert all(math.isfinite(strength) for strength in fit.strengths)
    assert fit.strengths[3] == pytest.approx(0.0, abs=1e-9)
    assert max(fit.standard_errors) == fit.standard_errors[3]


def test_bradley_terry_refuses_to_go_without_a_prior():
    for ridge in (0.0, 1e-20, math.nan, math.inf):
        with pytest.raises(ValueError, match="ridge"):
            bradley_terry(2, [verdict(0, 1, 0)], ridge=ridge)


outcomes = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 4), st.sampled_from(["first", "second", "tie"]), st.floats(0, 1)
    ).filter(lambda row: row[0] != row[1]),
    max_size=30,
)


def to_verdicts(rows: list[tuple[int, int, str, float]], names: list[int]) -> list[Verdict]:
    return [
        Verdict(
            first=names[i],
            second=names[j],
            p_first=p,
            p_second=1 - p,
            winner={"first": names[i], "second": names[j], "tie": None}[who],
        )
        for i, j, who, p in rows
    ]


@settings(max_examples=60)
@given(outcomes, st.permutations(range(5)), st.booleans())
def test_renaming_the_responses_permutes_the_rewards(rows, names, soft):
    plain, renamed = to_verdicts(rows, list(range(5))), to_verdicts(rows, list(names))
    for reward in (win_minus_loss, lambda n, v, soft: bradley_terry(n, v, soft=soft).strengths):
        before, after = reward(5, plain, soft=soft), reward(5, renamed, soft=soft)
        assert [after[names[i]] for i in range(5)] == pytest.approx(before, abs=1e-7)


@settings(max_examples=60)
@given(outcomes, st.booleans())
def test_what_one_wins_another_loses(rows, soft):
    verdicts = to_verdicts(rows, list(range(5)))
    assert sum(win_minus_loss(5, verdicts, soft=soft)) == pytest.approx(0.0, abs=1e-9)
    assert sum(bradley_terry(5, verdicts, soft=soft).strengths) == pytest.approx(0.0, abs=1e-7)


@settings(max_examples=60)
@given(outcomes, st.booleans())
def test_showing_the_mirror_image_of_every_comparison_changes_no_reward(rows, soft):
    verdicts = to_verdicts(rows, list(range(5)))
    mirrored = [
        v.model_copy(update={"first": v.second, "second": v.first, "p_first": v.p_second, "p_second": v.p_first})
        for v in verdicts
    ]
    assert win_minus_loss(5, mirrored, soft=soft) == pytest.approx(win_minus_loss(5, verdicts, soft=soft), abs=1e-9)


def test_consistency_bias_and_ties_of_the_table():
    # Pairs with both orders: {0,1} same, {0,2} not, {1,2} not (a tie against a winner).
    assert consistency([TABLE]).value == pytest.approx(1 / 3)
    # First position: (0,1) +1, (1,0) -1, (0,2) +1, (2,0) +1, (1,2) 0, (2,1) +1: 3 of 6.
    assert position_bias([TABLE]).value == pytest.approx(0.5)
    assert tie_rate([TABLE]).value == pytest.approx(1 / 6)


def test_bias_is_one_for_the_first_and_minus_one_for_the_second():
    assert position_bias([[verdict(i, j, i) for i, j in permutations(range(3), 2)]]).value == 1.0
    assert position_bias([[verdict(i, j, j) for i, j in permutations(range(3), 2)]]).value == -1.0


def test_an_unbiased_critic_shows_no_bias_even_where_the_order_of_responses_is_not_balanced():
    # Only one order of 0-1 was judged: it says nothing about position.
    assert position_bias([[verdict(0, 1, 0)]]) is None
    assert position_bias([[verdict(0, 1, 0), verdict(1, 0, 0), verdict(0, 2, 0)]]).value == 0.0


def test_nothing_compared_measures_nothing():
    assert (consistency([]), position_bias([[]]), tie_rate([])) == (None, None, None)


def test_same_indices_of_different_items_are_not_one_pair():
    assert consistency([[verdict(0, 1, 0)], [verdict(1, 0, 1)]]) is None


def test_failures_cost_as_few_responses_as_possible():
    failed = {(0, 3): "timeout", (3, 0): "timeout", (3, 1): "refused"}
    assert without_failures([0, 1, 2, 3], failed) == {3: "timeout"}
    assert without_failures([0, 1], {}) == {}


def test_credit_of_a_tie_is_nothing_unless_soft():
    assert score_of(verdict(0, 1, None, 0.6)) == 0.0
    assert score_of(verdict(0, 1, None, 0.6), soft=True) == pytest.approx(0.2)
