"""Pairs from rewards: each strategy on small tables, the counts, and what must hold for any rewards at all."""

from __future__ import annotations

import time
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reward.errors import RewardError
from reward.pairs import (
    BELOW_MARGIN,
    BOTH_SAME,
    DISAGREES,
    LENGTHS_DIFFER,
    NEAR_DUPLICATE,
    NO_CORRECTNESS,
    NOT_IN_STRATEGY,
    OVER_LIMIT,
    SAME_TEXT,
    STRATEGIES,
    TIED,
    UNSCORED,
    PairChoice,
    PairSettings,
    choose_pairs,
)
from reward.replay import balance_lengths, draw_replay, mean_log_ratio

TEXTS = ["red", "green", "blue", "yellow", "black"]


def indices(chosen) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in chosen.pairs]


def test_best_against_worst_is_one_pair_and_the_rest_is_counted():
    found = choose_pairs([4.0, 8.0, -8.0, 0.0, -4.0], TEXTS)
    assert found.pairs == [PairChoice(1, 2, 16.0)]
    assert found.dropped_pairs == {NOT_IN_STRATEGY: 9}
    assert found.why_none is None


def test_of_equally_good_responses_the_earlier_is_chosen():
    assert indices(choose_pairs([1.0, 1.0, 0.0, 0.0], TEXTS[:4])) == [(0, 2)]


def test_tied_rewards_make_no_pair():
    found = choose_pairs([2.0, 2.0, 2.0], TEXTS[:3])
    assert found.pairs == []
    assert found.dropped_pairs == {TIED: 3}
    assert found.why_none == "all rewards tied"


def test_a_pair_at_the_minimum_margin_is_kept_and_below_it_not():
    settings = PairSettings(min_margin=2.0)
    assert indices(choose_pairs([2.0, 0.0], TEXTS[:2], settings)) == [(0, 1)]
    found = choose_pairs([1.9, 0.0], TEXTS[:2], settings)
    assert found.pairs == []
    assert found.dropped_pairs == {BELOW_MARGIN: 1}
    assert found.why_none == BELOW_MARGIN


def test_a_single_usable_response_makes_no_pair():
    found = choose_pairs([1.0, None, 2.0], TEXTS[:3], excluded={2: "truncated"})
    assert found.pairs == []
    assert found.dropped_responses == {UNSCORED: 1, "truncated": 1}
    assert found.why_none == "fewer than two usable responses"


def test_no_responses_at_all_is_no_error():
    assert choose_pairs([], []).why_none == "fewer than two usable responses"


def test_the_same_text_in_other_clothes_takes_part_once():
    found = choose_pairs([1.0, 3.0, 0.0], ["Two cats.", " two  cats", "three cats"])
    assert indices(found) == [(0, 2)]
    assert found.dropped_responses == {SAME_TEXT: 1}


def test_an_excluded_response_does_not_take_its_twin_with_it():
    found = choose_pairs([1.0, 1.0, 0.0], ["a cat", "a cat", "a dog"], excluded={0: "truncated"})
    assert indices(found) == [(1, 2)]


def test_near_duplicates_are_removed_on_request_only():
    texts = ["a red car in the street", "a red car in the streets", "a boat"]
    rewards = [2.0, 1.0, 0.0]
    assert choose_pairs(rewards, texts).dropped_responses == {}
    found = choose_pairs(rewards, texts, PairSettings(near_duplicate=0.9))
    assert found.dropped_responses == {NEAR_DUPLICATE: 1}


def test_top_and_bottom_are_crossed_widest_first():
    found = choose_pairs(
        [5.0, 4.0, 3.0, 2.0, 1.0], TEXTS, PairSettings(strategy="topk_bottomk", max_per_question=99, top_k_pairs=2)
    )
    assert indices(found) == [(0, 4), (0, 3), (1, 4), (1, 3)]
    assert found.dropped_pairs == {NOT_IN_STRATEGY: 6}


def test_top_and_bottom_never_overlap():
    found = choose_pairs(
        [3.0, 2.0, 1.0], TEXTS[:3], PairSettings(strategy="topk_bottomk", max_per_question=99, top_k_pairs=2)
    )
    assert indices(found) == [(0, 2)]


def test_all_above_a_margin_up_to_the_limit():
    settings = PairSettings(strategy="all_above_margin", min_margin=2.0, max_per_question=2)
    found = choose_pairs([5.0, 3.0, 2.0, 1.0], TEXTS[:4], settings)
    assert indices(found) == [(0, 3), (0, 2)]
    # Margins: 4, 3, 2 (0-1), 2 (1-3) reach 2; 1 (1-2) and 1 (2-3) do not.
    assert found.dropped_pairs == {BELOW_MARGIN: 2, OVER_LIMIT: 2}


def test_closest_above_a_margin_takes_the_hardest():
    settings = PairSettings(strategy="closest_above_margin", min_margin=2.0, max_per_question=1)
    assert indices(choose_pairs([9.0, 6.0, 3.5], TEXTS[:3], settings)) == [(1, 2)]


def test_correct_against_wrong_uses_every_response_once_before_any_twice():
    settings = PairSettings(strategy="correct_incorrect", max_per_question=2)
    found = choose_pairs([1.0, 1.0, 0.0, 0.0], TEXTS[:4], settings)
    assert indices(found) == [(0, 2), (1, 3)]
    assert found.dropped_pairs == {BOTH_SAME: 2, OVER_LIMIT: 2}


@pytest.mark.parametrize(("num_right", "num_wrong"), [(2, 3), (3, 2), (1, 4), (4, 6), (3, 3)])
def test_no_response_is_used_twice_more_than_another_on_its_side(num_right, num_wrong):
    rewards, texts = [1.0] * num_right + [0.0] * num_wrong, [f"text {n}" for n in range(num_right + num_wrong)]
    pairs = choose_pairs(rewards, texts, PairSettings(strategy="correct_incorrect", max_per_question=99)).pairs
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == num_right * num_wrong
    for taken in range(1, len(pairs) + 1):
        used = Counter(index for pair in pairs[:taken] for index in (pair.chosen, pair.rejected))
        for side in (range(num_right), range(num_right, num_right + num_wrong)):
            assert max(used[index] for index in side) - min(used[index] for index in side) <= 1


def test_fifty_long_responses_are_compared_in_no_time():
    texts = [f"word{n} " * 300 for n in range(50)]
    before = time.process_time()
    choose_pairs([float(n) for n in range(50)], texts)
    assert time.process_time() - before < 0.3


def test_correctness_from_elsewhere_overrules_and_a_critic_that_disagrees_makes_no_pair():
    settings = PairSettings(strategy="correct_incorrect", max_per_question=99)
    found = choose_pairs([5.0, 9.0, 1.0, 2.0], TEXTS[:4], settings, correct=[True, False, False, None])
    assert indices(found) == [(0, 2)]
    assert found.dropped_pairs == {DISAGREES: 1, BOTH_SAME: 1, NO_CORRECTNESS: 3}


def test_pairs_of_very_different_length_are_dropped_and_counted():
    settings = PairSettings(strategy="all_above_margin", max_length_ratio=2.0, max_per_question=99)
    found = choose_pairs([3.0, 2.0, 1.0], ["abcd", "ab", "a"], settings)
    assert indices(found) == [(0, 1), (1, 2)]
    assert found.dropped_pairs == {LENGTHS_DIFFER: 1}
    assert len(choose_pairs([3.0, 2.0, 1.0], ["abcd", "ab", "a"], settings, lengths=[5, 5, 5]).pairs) == 3


def test_every_strategy_of_the_settings_has_a_function():
    assert set(get_args(PairSettings.model_fields["strategy"].annotation)) == set(STRATEGIES)


def test_every_fault_of_the_settings_is_named():
    with pytest.raises(ValidationError, match=r"(?s)strategy.*min_margin.*max_per_question.*near_duplicate"):
        PairSettings(strategy="best", max_per_question=0, min_margin=-1, near_duplicate=2)


reward_lists = st.lists(st.one_of(st.none(), st.integers(-4, 4).map(float)), min_size=0, max_size=6)
any_settings = st.builds(
    PairSettings,
    strategy=st.sampled_from(sorted(STRATEGIES)),
    max_per_question=st.integers(1, 9),
    min_margin=st.integers(0, 3).map(float),
    top_k_pairs=st.integers(1, 3),
    max_length_ratio=st.one_of(st.none(), st.sampled_from([1.0, 1.5, 3.0])),
)


@st.composite
def questions(draw):
    rewards = draw(reward_lists)
    texts = draw(st.lists(st.text("ab", max_size=4), min_size=len(rewards), max_size=len(rewards)))
    excluded = draw(st.dictionaries(st.integers(0, 5), st.just("truncated"), max_size=2))
    return rewards, texts, {index: why for index, why in excluded.items() if index < len(rewards)}


@settings(max_examples=200)
@given(questions(), any_settings)
def test_no_pair_has_a_chosen_reward_at_or_below_the_rejected_one(question, pair_settings):
    rewards, texts, excluded = question
    for pair in choose_pairs(rewards, texts, pair_settings, excluded=excluded).pairs:
        assert rewards[pair.chosen] > rewards[pair.rejected]
        assert pair.margin == rewards[pair.chosen] - rewards[pair.rejected] >= pair_settings.min_margin
        assert not {pair.chosen, pair.rejected} & set(excluded)


@settings(max_examples=200)
@given(questions(), any_settings)
def test_the_counts_add_up(question, pair_settings):
    rewards, texts, excluded = question
    found = choose_pairs(rewards, texts, pair_settings, excluded=excluded)
    usable = len(rewards) - sum(found.dropped_responses.values())
    assert len(found.pairs) + sum(found.dropped_pairs.values()) == usable * (usable - 1) // 2
    assert (found.why_none is None) == bool(found.pairs)
    assert all(count > 0 for count in (*found.dropped_pairs.values(), *found.dropped_responses.values()))


@settings(max_examples=200)
@given(questions(), any_settings, st.sampled_from([0.25, 2.0, 16.0]))
def test_scaling_rewards_and_margin_together_changes_no_pair(question, pair_settings, factor):
    rewards, texts, excluded = question
    scaled = pair_settings.model_copy(
        update={
            "min_margin": pair_settings.min_margin * factor,
            "correct_threshold": pair_settings.correct_threshold * factor,
        }
    )
    plain = choose_pairs(rewards, texts, pair_settings, excluded=excluded)
    found = choose_pairs([r if r is None else r * factor for r in rewards], texts, scaled, excluded=excluded)
    assert indices(found) == indices(plain)
    assert found.dropped_pairs == plain.dropped_pairs


@settings(max_examples=200)
@given(st.permutations([8.0, 4.0, 1.0, -3.0, -9.0]), any_settings)
def test_pairs_follow_the_responses_whatever_their_order(rewards, pair_settings):
    # With no two rewards equal and lengths out of play, the same rewards must meet, wherever they stand.
    pair_settings = pair_settings.model_copy(update={"max_length_ratio": None, "max_per_question": 99})
    texts = [f"text {reward}" for reward in rewards]
    base = choose_pairs([8.0, 4.0, 1.0, -3.0, -9.0], TEXTS, pair_settings)
    expected = {(p.margin, [8.0, 4.0, 1.0, -3.0, -9.0][p.chosen]) for p in base.pairs}
    assert {(p.margin, rewards[p.chosen]) for p in choose_pairs(rewards, texts, pair_settings).pairs} == expected


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), max_size=30), st.sampled_from([0.0, 0.05, 0.3]))
def test_balanced_lengths_are_within_the_limit_and_no_pair_is_dropped_in_vain(lengths, limit):
    kept = balance_lengths(lengths, limit=limit)
    mean = mean_log_ratio([lengths[index] for index in kept])
    before = mean_log_ratio(lengths)
    assert mean is None or abs(mean) <= max(limit, abs(before)) + 1e-9
    if before is None or abs(before) <= limit:
        assert kept == list(range(len(lengths)))


def test_balancing_never_tips_the_balance_further_to_the_other_side():
    # Log ratios 3, -1, -1: without the first the mean would be -1 instead of 1/3.
    long, short = (2009, 100), (100, 272)
    assert balance_lengths([long, short, short], limit=0.1) == [0, 1, 2]
    # 3, 1/2, 1/2, -1, -1: without the first the mean is -1/4 instead of 2/5; without a short one besides it is 0.
    assert balance_lengths([long, (165, 100), (165, 100), short, short], limit=0.1) == [1, 2, 4]


def test_where_all_lean_to_one_side_nothing_balances():
    assert balance_lengths([(30, 10), (30, 10)], limit=0.1) == []


def test_balancing_drops_the_pairs_that_lean_most():
    assert balance_lengths([(10, 80), (10, 20), (20, 10)], limit=0.0) == [1, 2]
    assert balance_lengths([], limit=0.1) == []
    with pytest.raises(RewardError, match="negative"):
        balance_lengths([], limit=-1)


def test_earlier_pairs_make_up_the_share_asked_for():
    margins = [float(margin) for margin in range(100)]
    picked = draw_replay(90, margins, fraction=0.1)
    assert picked == list(range(10))
    assert draw_replay(90, margins[:3], fraction=0.1) == [0, 1, 2]
    assert draw_replay(90, margins, fraction=0.0) == []


def test_random_earlier_pairs_depend_on_the_seed_alone():
    margins = [1.0] * 50
    one = draw_replay(10, margins, fraction=0.5, order="random", seed=1)
    assert one == draw_replay(10, margins, fraction=0.5, order="random", seed=1)
    assert one != draw_replay(10, margins, fraction=0.5, order="random", seed=2)
    assert len(set(one)) == 10


def test_a_nonsense_share_is_refused():
    with pytest.raises(RewardError, match="below 1"):
        draw_replay(10, [1.0], fraction=1.0)
    with pytest.raises(RewardError, match="hardest or random"):
        draw_replay(10, [1.0], fraction=0.1, order="easiest")
