from __future__ import annotations

import numpy as np
import pytest

from align.statistics import bootstrap_mean, distinct_n, is_refusal, paired_difference, repetition, words
from reward.intervals import wilson


def test_the_mean_over_questions_with_several_values_is_the_plain_mean():
    interval = bootstrap_mean([[1.0, 0.0], [1.0], [], [0.0, 0.0, 1.0]])
    assert interval.mean == pytest.approx(3 / 6)
    assert interval.count == 3
    assert interval.low <= interval.mean <= interval.high


def test_the_bootstrap_interval_matches_the_normal_approximation():
    values = [1.0] * 160 + [0.0] * 240
    interval = bootstrap_mean(values, resamples=20_000)
    half = 1.96 * (0.4 * 0.6 / 400) ** 0.5
    assert interval.low == pytest.approx(0.4 - half, abs=0.006)
    assert interval.high == pytest.approx(0.4 + half, abs=0.006)


def test_responses_of_one_question_do_not_narrow_the_interval():
    generator = np.random.default_rng(1)
    single = generator.integers(0, 2, 100).astype(float).tolist()
    copied = [[value] * 5 for value in single]
    one, five = bootstrap_mean(single), bootstrap_mean(copied)
    assert (five.low, five.high, five.count) == (one.low, one.high, 100)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_many_questions_are_resampled_in_blocks():
    values = np.random.default_rng(0).normal(3, 1, 30_000).tolist()
    interval = bootstrap_mean(values, resamples=300)
    assert interval.low == pytest.approx(3 - 1.96 / 30_000**0.5, abs=0.01)
    assert interval.high == pytest.approx(3 + 1.96 / 30_000**0.5, abs=0.01)


def test_pairing_removes_the_spread_between_questions():
    hard = np.random.default_rng(0).normal(0, 10, 200)
    before, after = hard.tolist(), (hard + 1).tolist()
    paired = paired_difference(before, after)
    assert paired.mean == pytest.approx(1)
    assert paired.high - paired.low < 1e-9
    assert bootstrap_mean(before).high - bootstrap_mean(before).low > 1


def test_a_paired_difference_uses_only_questions_with_values_on_both_sides():
    difference = paired_difference([[0.0], [], [1.0]], [[1.0, 1.0], [1.0], [0.0]])
    assert difference.count == 2
    assert difference.mean == pytest.approx(2 / 3 - 1 / 2)


def test_equal_answers_give_no_difference_and_a_clear_gain_excludes_zero():
    same = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero
    assert paired_difference([0.0] * 50, [1.0] * 40 + [0.0] * 10).excludes_zero


@pytest.mark.parametrize("values", [[], [[], []], [1.0, float("nan")]])
def test_nothing_to_average_is_an_error(values):
    with pytest.raises(ValueError, match="values"):
        bootstrap_mean(values)


def test_pairs_of_different_length_are_an_error():
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1.0], [1.0, 0.0])


def test_wilson_equals_worked_examples():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: 81 of 263 and 15 of 148.
    one, two = wilson(81, 263), wilson(15, 148)
    assert (round(one.low, 4), round(one.high, 4)) == (0.2553, 0.3662)
    assert (round(two.low, 4), round(two.high, 4)) == (0.0624, 0.1605)


def test_wilson_stays_inside_zero_and_one():
    none, all_ = wilson(0, 20), wilson(20, 20)
    assert none.low == 0
    assert round(none.high, 4) == 0.1611
    assert all_.high == 1
    assert round(all_.low, 4) == 0.8389
    with pytest.raises(ValueError, match="successes"):
        wilson(3, 2)


def test_words_split_spaced_and_unspaced_scripts():
    assert words("The dog's 3 balls, 两只狗!") == ["the", "dog's", "3", "balls", "两", "只", "狗"]
    assert words("naïve_café") == ["naïve_café"]


def test_repetition_counts_repeated_four_grams():
    assert repetition("") == 0
    assert repetition("a b c d e f g h") == 0
    # 8 words, 5 four-grams, one of them again: abcd bcda cdab dabc abcd
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("the same " * 50) > 0.9
    assert repetition("好" * 40) == pytest.approx(1 - 1 / 37)


def test_distinct_counts_over_all_texts():
    assert distinct_n(["a b", "a b"], 2) == 0.5
    assert distinct_n(["a b", "b a"], 2) == 1
    assert distinct_n(["a"], 2) == 0
    assert distinct_n([], 1) == 0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, I cannot help with this.",
        "Sorry, I am unable to answer.",
        "I cannot provide that information.",
        "As an AI language model, I cannot see images.",
        "Unfortunately, I can't identify people.",
        "抱歉，我无法回答这个问题。",
        "作为一个人工智能，我不能查看图片。",
        "我无法提供这些信息。",
    ],
)
def test_refusals_are_seen(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "There are 3 digits.",
        "I cannot see a 7 in the picture.",
        "The sign says: sorry, we are closed.",
        "I'm sorry for the blurry digits, the answer is 4.",
        "图中的门无法打开。",
        "I can't help but notice the red car.",
        "A long description. I can't help but notice the red car.",
    ],
)
def test_answers_are_not_refusals(text):
    assert not is_refusal(text)
