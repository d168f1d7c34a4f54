"""What judges write, in English and Chinese, against the rating that a person reads in it, or none with the reason."""

from __future__ import annotations

import pytest

from reward.critics import Item, make_critic
from reward.written_rating import FRACTION, NO_RATING, OUTSIDE, RANGE, SCALES, SEVERAL, STARS, read_rating
from tests.reward.judge_models import FunctionModel

# Asked for 0-100.
CLEAR = {
    "85": 85,
    "85.": 85,
    "<score>85</score>": 85,
    "<think>It names 2 cats.</think>\n<rating> 8/10 </rating>": 80,
    "Rating: 8.5e1": 85,
    "总分100分，我给85分": 85,
    "总分为10分，这个回答得8分": 80,
    "**85**": 85,
    "Score: 85": 85,
    "Score:85": 85,
    "score = 85": 85,
    "Score is 85.": 85,
    "SCORE: 85/100": 85,
    "Score: **85**": 85,
    "**Score:** 85": 85,
    "Score:\n85": 85,
    "Score: 85. It names 2 cats.": 85,
    "The response names 3 dogs. Score: 70": 70,
    "[[85]]": 85,
    "It names 2 cats.\n[[85]]": 85,
    "Score (0-100): 85": 85,
    "Score (0 - 100): 85": 85,
    "Score [0-100]: 85": 85,
    "Score (0 to 100): 85": 85,
    "Score (from 0 to 100): 85": 85,
    "Score (between 0 and 100): 85": 85,
    "Score (0–100): 85": 85,
    "Score (out of 100): 85": 85,
    "Score (max 100): 85": 85,
    "Score 0-100: 85": 85,
    "On a scale of 0 to 100, I give it 85.": 85,
    "On a scale from 0 to 100: 85": 85,
    "85 on a scale of 0-100": 85,
    "85 (0-100)": 85,
    "85 out of 100": 85,
    "85 out of a possible 100": 85,
    "85 points out of 100": 85,
    "I give it 85 points for its 3 facts.": 85,
    "I would rate this response 85.": 85,
    "Rating: 85%": 85,
    "85%": 85,
    "Rating: 8/10": 80,
    "8/10": 80,
    "8 / 10": 80,
    "8 out of 10": 80,
    "4 stars out of 5": 80,
    "Score: 8.5/10": 85,
    "Score: 8,5/10": 85,
    "Score: 85,5": 85.5,
    "Score: 85.5": 85.5,
    "Rating (0-10): 7": 70,
    "Rating (1-10): 7": 100 * 6 / 9,
    "Rating (1 to 5): 4": 75,
    "On a scale of 1 to 10, this is a 7": 100 * 6 / 9,
    "On a 1-10 scale: 7": 100 * 6 / 9,
    "On a 10-point scale I give 7": 70,
    "On a scale of 10: 7": 70,
    "Rating from 1 to 10: 7": 100 * 6 / 9,
    "Rating (out of 10): 7": 70,
    "Accuracy score: 70. Overall score: 80": 80,
    "Clarity: 7/10, detail: 9/10. Final rating: 8/10": 80,
    "Total: 85": 85,
    "Overall: 85/100": 85,
    "Score: eighty-five": 85,
    "eight out of ten": 80,
    "Score: 0": 0,
    "Score: 100": 100,
    "Score: 85 (good)": 85,
    "Score: 85. Again: score 85.": 85,
    "85分": 85,
    "评分：85": 85,
    "评分：８５分": 85,
    "得分:85分": 85,
    "分数是85。图中有3只猫。": 85,
    "评分（0-100）：85": 85,
    "评分（0到100分）：85分": 85,
    "评分范围0-100：85": 85,
    "满分100分，我给85分": 85,
    "满分10分，得8分": 80,
    "10分满分，得8分": 80,
    "8分（满分10分）": 80,
    "八十五分": 85,
    "评分：八分（满分十分）": 80,
    "评分：8分（十分制）": 80,
    "评分：85分（百分制）": 85,
    "我给这个回答打85分": 85,
    "得分：8/10": 80,
    "最终评分：80。细节评分：70": 80,
    "百分之八十五": 85,
    "总分：85分": 85,
    "It names 3 out of 4 objects. Score: 90": 90,
    "The ratio 3/4 is right. Score: 90/100": 90,
    "Accurate: 3 of 4. 80/100": 80,
    "80/100分": 80,
    "评分：8/10，3/4正确": 80,
    "Score: 85/100. It names 3 of 4.": 85,
    "[[70]] because 2 of the 3 are right": 70,
    "3½ out of 5": 70,
    "3 1/2 out of 5": 70,
    "4½/5": 90,
    "Score: 8 of 10": 80,
    '{"score": 85}': 85,
    '{"score": 8, "max": 10}': 80,
    '{"rating": "8/10", "reason": "3 errors"}': 80,
    "I'd rate it 8/10 overall, 7/10 for style": 80,
    "7 on a ten-point scale": 70,
    "on a scale of one to ten, seven": 100 * 6 / 9,
    "Score out of ten: 8": 80,
    "Four out of five stars": 80,
    "ninety-five": 95,
    "A hundred": 100,
    "八十五": 85,
    "评分：八十五": 85,
    "4星（共5星）": 80,
    "扣15分，85分": 85,
    "Deduct 15 points: 85": 85,
    "Out of 10, I'd give it an 8": 80,
    "Of 10 points, it earns 8.": 80,
    "8 pts. out of 10 pts.": 80,
    "8 marks out of 10": 80,
    "8 points out of 10": 80,
    "Score/100: 85": 85,
    "Score /10: 8": 80,
    "Score out of 10: 8": 80,
    "Score (of 100): 85": 85,
    "Score (max. 100): 85": 85,
    "Score (100 max): 85": 85,
    "Score (0..100): 85": 85,
    "Score ∈ [0,100]: 85": 85,
    "Score (0-1): 0.85": 85,
    "Rating from 0 (worst) to 10 (best): 8": 80,
    "Rating (0 = worst, 10 = best): 8": 80,
    "Rating (1=bad, 5=good): 4": 75,
    "where 0 is worst and 100 is best, I give 85": 85,
    "The score ranges from 0 to 100. I give 85.": 85,
    "Score: 85\n\nNote: scores are from 0 to 100.": 85,
    "Score #1: 85": 85,
    "Response 1: 85": 85,
    "Rating for Response 2: 85": 85,
    "回答2得85分": 85,
}

UNCLEAR = {
    "85+": RANGE,
    "80 at best": RANGE,
    "4-star rating": STARS,
    "4 stars": STARS,
    "5星": STARS,
    "负5分": OUTSIDE,
    "Score: minus five": OUTSIDE,
    "85 of 100 things": SEVERAL,
    "Accuracy (0-50): 40, total (0-100): 85": SCALES,
    "full marks": NO_RATING,
    "五分之四": NO_RATING,
    "Score: 80-90": RANGE,
    "Score: 80 - 90": RANGE,
    "Score: 80–90": RANGE,
    "Score: 80 to 90": RANGE,
    "Score: 80 or 90": RANGE,
    "between 80 and 90": RANGE,
    "Score: between 80 and 90": RANGE,
    "Score (0-100): 80-90": RANGE,
    "7-8/10": RANGE,
    "80~90分": RANGE,
    "80到90分": RANGE,
    "评分：80至90分": RANGE,
    "介于80和90之间": RANGE,
    "Score: 85 ± 5": RANGE,
    "Score: at least 80": RANGE,
    "Score: below 50": RANGE,
    "Score: > 80": RANGE,
    "至少80分": RANGE,
    "80分以上": RANGE,
    "2 of 3 cats": SEVERAL,
    "Score: 80. No, score: 70.": SEVERAL,
    "The first gets 80, the second 70.": SEVERAL,
    "8/10 for truth, 6/10 for style": SEVERAL,
    "细节80分，准确70分": SEVERAL,
    "Rating 80, or rather, rating 60": SEVERAL,
    "3 or 4": RANGE,
    "5/0": OUTSIDE,
    "120": OUTSIDE,
    "Score: 120": OUTSIDE,
    "Score: -5": OUTSIDE,
    "Score: 1,000": OUTSIDE,
    "Rating (1-10): 85": OUTSIDE,
    "12/10": OUTSIDE,
    "评分（1-10）：85": OUTSIDE,
    "Score: 0.85": FRACTION,
    "Rating (1-10) and (0-100): 7": SCALES,
    "Good.": NO_RATING,
    "Score: N/A": NO_RATING,
    "Score: high": NO_RATING,
    "One of the dogs is missing.": NO_RATING,
    "这个回答十分好": NO_RATING,
    "三分之一的内容是错的": NO_RATING,
    "Rating (1-10):": NO_RATING,
    "★★★★☆": NO_RATING,
    "": NO_RATING,
}

# Asked for 1-5.
FIVE = {
    "4": 75,
    "4/5": 75,
    "Rating (1-5): 4": 75,
    "8/10": 80,
    "80%": 80,
    "Score (0-100): 85": 85,
    "4,5": 87.5,
    "4 stars": 75,
    "评分：4分（满分5分）": 75,
}


@pytest.mark.parametrize("text", CLEAR)
def test_a_clear_rating_is_read(text):
    found = read_rating(text, (0.0, 100.0))
    assert found.value == pytest.approx(CLEAR[text]), found.reason


@pytest.mark.parametrize("text", UNCLEAR)
def test_an_unclear_rating_is_none_with_its_reason(text):
    found = read_rating(text, (0.0, 100.0))
    assert (found.value, found.reason) == (None, UNCLEAR[text])


@pytest.mark.parametrize("text", FIVE)
def test_a_scale_of_five_is_read_unless_the_judge_names_another(text):
    found = read_rating(text, (1.0, 5.0))
    assert found.value == pytest.approx(FIVE[text]), found.reason


@pytest.mark.parametrize("value", [0, 1, 7, 10])
@pytest.mark.parametrize(
    "form",
    [
        "Rating (0-10): {}",
        "On a scale from 0 to 10, {}",
        "Score (0 to 10) = {}",
        "{} out of 10",
        "{}/10",
        "满分10分，得{}分",
        "评分（0-10）：{}",
        "Overall rating (out of 10): {}",
    ],
)
def test_no_scale_is_ever_its_own_rating(form, value):
    assert read_rating(form.format(value), (0.0, 100.0)).value == pytest.approx(10 * value)


def test_a_pointwise_critic_says_why_it_could_not_read_a_rating():
    texts = {"a": "Rating (1-10): 7", "b": "between 80 and 90", "c": "I'm sorry, I can't help with that."}
    model = FunctionModel(text=lambda turn: next(text for key, text in texts.items() if f"[{key}]" in turn))
    critic = make_critic("pointwise", {"read": "text"}, judge_model=model)
    [judgement] = critic.judge([Item("q", "What?", (), tuple(texts))])
    assert judgement.rewards == [pytest.approx(66.666666667), None, None]
    assert judgement.unscored == {1: RANGE, 2: "the critic refused"}


@pytest.mark.parametrize("loop", ["1 ", "score ", "(", "to 1 ", "hundred ", "一百", "12345", "over ", " ", "(0-", "8/"])
def test_a_judge_that_loops_is_read_at_its_ends_alone(loop):
    text = loop * 200_000
    read_rating(text, (0.0, 100.0))
    assert read_rating(f"{text} Score: 70\n", (0.0, 100.0)).value in (70, None)
