"""The verifier on right and wrong answers of every kind, in English and Chinese, marked and unmarked."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import answers
from reward.critics import make_critic
from reward.critics.base import NO_REFERENCE
from reward.critics.verifier import VerifierCritic, answer_kind, grade, iou
from reward.errors import RewardError
from reward.judgement import Item

LETTERED = "What animal is it?\nA. a cat\nB. a black dog\nC. a bird\nAnswer with the letter."

# reference, response, question, right?
CASES = [
    # exact
    ("a red car", "Red car.", "", True),
    ("a red car", "the RED  car", "", True),
    ("a red car", "A blue car.", "", False),
    ("a red car", "I think so. Final answer: a red car", "", True),
    ("The picture shows two digits: 3 and 7.", "the picture shows two digits: 3 and 7", "", True),
    ("The picture shows two digits: 3 and 7.", "The picture shows two digits: 3 and 1.", "", False),
    ("红色的汽车", "红色的汽车。", "", True),
    ("红色", "答案：红色", "", True),
    # yes or no
    ("yes", "Yes, there is a 4.", "", True),
    ("Yes.", "No, there is no 4.", "", False),
    ("no", "There isn't any.", "", True),
    ("是", "是的，图中有一只猫。", "", True),
    ("没有", "不，没有猫。", "", True),
    ("没有", "有一只猫。", "", False),
    ("no", "There isn’t any.", "", True),
    ("no", "I don't see one.", "", True),
    ("no", "No, sorry.", "", True),
    # not to answer is not to say no (or yes)
    ("no", "I can't tell.", "", False),
    ("no", "I’m sorry, but I can’t help with that. It would not be right.", "", False),
    ("no", "Not sure.", "", False),
    ("是", "对不起，我无法回答。", "", False),
    ("没有", "无法判断。", "", False),
    ("没有", "不知道", "", False),
    # numbers
    ("3", "There are three cats.", "", True),
    ("3", "There are 2 cats and 1 dog, so 3 animals.", "", True),
    ("3", "3 cats or perhaps 4", "", False),
    ("three", "3", "", True),
    ("1,234", "The total is 1234.", "", True),
    ("0.5", r"So \boxed{\frac{1}{2}}.", "", True),
    ("-5", "The temperature is −5 degrees.", "", True),
    ("50%", "50", "", True),
    ("50%", "The share is 0.5", "", True),
    ("0.5", "50%", "", True),
    ("50", "0.5", "", False),
    ("12", "<answer>12</answer> not 13", "", True),
    ("12", r"\boxed{11} no, \boxed{12}", "", True),
    ("一百零二", "共有102只。", "", True),
    ("35", "答案是三十五", "", True),
    ("3只", "图中有三只猫。", "", True),
    ("２", "两只", "", True),
    ("4", "I cannot tell.", "", False),
    ("2", "1/0", "", False),
    ("0.5", "½", "", True),
    # numbers in order
    ("3, 7 and 2", "From left to right: 3, 7, 2.", "", True),
    ("3 7 2", "3, 2 and 7", "", False),
    ("3 7 2", "I see 3 and 7.", "", False),
    # choice
    ("B", "B", LETTERED, True),
    ("B", "(b)", LETTERED, True),
    ("B", "B. a black dog", LETTERED, True),
    ("B", "The answer is B because it barks.", LETTERED, True),
    ("B", "A black dog.", LETTERED, True),
    ("a black dog", "B", LETTERED, True),
    ("(B) a black dog", "The correct option is (B).", LETTERED, True),
    ("B", "A", LETTERED, False),
    ("B", "It is (A) or (B).", LETTERED, False),
    ("B", "A large bird I saw", LETTERED, False),
    ("C", "选C", "哪个？(A) 猫 (B) 狗 (C) 鸟", True),
    ("C", "鸟", "哪个？(A) 猫 (B) 狗 (C) 鸟", True),
    ("D", "I choose D", "", True),
    ("A", "A is correct.", "", True),
    ("B", "My answer is a black dog.", LETTERED, False),
    ("A", "My answer is a black dog.", LETTERED, False),
    ("B", "My choice: b, the dog", LETTERED, True),
    # sets
    ("{red, blue}", "blue and red", "", True),
    ("{red, blue}", "Answer: blue, red and green", "", False),
    ("{红色、蓝色}", "蓝色和红色", "", True),
    # boxes
    ("[0, 0, 10, 10]", "It is at [1, 0, 10, 10].", "", True),
    ("[0, 0, 10, 10]", "<box>(0,0),(10,10)</box>", "", True),
    ("[0, 0, 10, 10]", "[20, 20, 30, 30]", "", False),
    ("[[0, 0, 10, 10], [20, 20, 30, 30]]", "[20, 20, 30, 30] and [0, 0, 10, 10]", "", True),
    ("[[0, 0, 10, 10], [20, 20, 30, 30]]", "[20, 20, 30, 30]", "", False),
    ("[0, 0, 10, 10]", "[0, 0, 10, 10] and [20, 20, 30, 30]", "", False),
    ("[0, 0, 10, 10]", "top left", "", False),
]


@pytest.mark.parametrize(("reference", "response", "question", "right"), CASES)
def test_answers_are_compared_as_a_person_would(reference, response, question, right):
    found = grade(response, reference, question=question)
    assert found.correct is right, found


@pytest.mark.parametrize(
    ("reference", "question", "kind"),
    [
        ("B", "", "choice"),
        ("(C).", "", "choice"),
        ("a cat", LETTERED, "choice"),
        ("a cat", "What is it?", "exact"),
        ("I", "Which numeral?", "choice"),
        ("No", "", "yes_no"),
        ("不是", "", "yes_no"),
        ("12.5 cm", "", "number"),
        ("$3.50", "", "number"),
        ("二十三", "", "number"),
        ("10:30", "", "exact"),
        ("2023-05-01", "", "exact"),
        ("2 red and 3 blue cars", "", "exact"),
        ("There are three digits.", "", "exact"),
        ("一样", "", "exact"),
        ("3、7", "", "numbers"),
        ("{3, 7}", "", "set"),
        ("<box>[1, 2, 3, 4]</box>", "", "boxes"),
        ("the cat at [1, 2, 3, 4]", "", "exact"),
        (r"\boxed{7}", "", "number"),
    ],
)
def test_the_kind_of_answer_is_recognised(reference, question, kind):
    assert answer_kind(reference, question) == kind


def test_a_given_kind_overrules_the_looks():
    assert not grade("7 and 3", "3, 7").correct
    assert grade("7 and 3", "3, 7", kind="set").correct
    assert grade("It is a red car, parked.", "red car", kind="contains").correct
    assert not grade("It is scared carefully", "red car", kind="contains").correct
    assert grade("图中是红色的汽车", "红色", kind="contains").correct


def test_numbers_may_be_off_by_the_tolerance_only():
    assert grade("104", "100", tolerance=0.05).correct
    assert not grade("106", "100", tolerance=0.05).correct
    assert not grade("104", "100").correct


def test_sets_and_boxes_have_scores_between_right_and_wrong():
    # Two wanted, two found, one in both: F1 = 2 * 1 / 4.
    assert grade("red, green", "{red, blue}").score == pytest.approx(0.5)
    # The found box is the left half of the wanted one.
    found = grade("[0, 0, 5, 10]", "[0, 0, 10, 10]", min_iou=0.6)
    assert (found.score, found.correct) == (0.5, False)
    assert grade("[0, 0, 5, 10]", "[0, 0, 10, 10]", min_iou=0.5).correct
    # One of two boxes found exactly: the mean over two.
    assert grade("[0,0,10,10]", "[[0,0,10,10],[20,20,30,30]]").score == pytest.approx(0.5)


def test_iou_of_the_same_box_is_one_and_of_an_empty_one_zero():
    assert iou((1, 1, 4, 5), (1, 1, 4, 5)) == 1.0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0


def test_rewards_are_one_and_zero_with_what_was_read():
    item = Item("q", "How many?", (), ("two cats", "I see 3", "3", "no idea"), answer="3")
    [judgement] = VerifierCritic().judge([item])
    assert judgement.rewards == [0.0, 1.0, 1.0, 0.0]
    assert judgement.evidence == {
        "kind": "number",
        "read": ["2.0", "3.0", "3.0", None],
        "correct": [False, True, True, False],
    }


def test_partial_credit_is_for_those_who_ask():
    item = Item("q", "Colours?", (), ("red, green", "red, blue"), answer="{red, blue}")
    assert VerifierCritic().judge([item])[0].rewards == [0.0, 1.0]
    assert VerifierCritic(partial=True).judge([item])[0].rewards == [0.5, 1.0]


@pytest.mark.parametrize("answer", [None, "  "])
def test_without_a_reference_answer_nothing_is_scored(answer):
    [judgement] = VerifierCritic().judge([Item("q", "?", (), ("a", "b"), answer=answer)])
    assert judgement.rewards == [None, None]
    assert judgement.unscored == {0: NO_REFERENCE, 1: NO_REFERENCE}
    assert judgement.evidence == {"correct": [None, None]}


def test_a_reference_that_is_not_of_its_kind_is_unscored():
    [judgement] = VerifierCritic().judge([Item("q", "?", (), ("a",), answer="red", answer_kind="number")])
    assert judgement.unscored == {0: "the reference answer is not of kind number"}


def test_the_items_own_kind_is_used_and_the_critics_before_it():
    item = Item("q", "?", (), ("7, 3",), answer="3, 7", answer_kind="set")
    assert VerifierCritic().judge([item])[0].rewards == [1.0]
    assert VerifierCritic(kind="numbers").judge([item])[0].rewards == [0.0]


def test_unknown_kinds_and_bad_limits_are_refused():
    with pytest.raises(RewardError, match=r"kind.*'numeric'.*tolerance.*min_iou"):
        make_critic("verifier", {"kind": "numeric", "tolerance": 2.0, "min_iou": 0.0})
    with pytest.raises(RewardError, match="answer kind"):
        grade("1", "1", kind="numeric")


@given(st.text(max_size=80), st.sampled_from(["B", "yes", "3", "3, 7", "{a, b}", "[1, 2, 3, 4]", "a cat"]))
def test_no_response_whatever_breaks_the_verifier(response, reference):
    found = grade(response, reference)
    assert 0.0 <= found.score <= 1.0


@pytest.mark.parametrize(
    "loop", ["一", "二千", "亿", "hundred ", "million ", "9", "1e999/", "<answer>", "\\boxed{", "[1,", "A. "]
)
@pytest.mark.parametrize("reference", ["3", "3, 7", "B", "yes", "{a, b}", "[1, 2, 3, 4]", "a cat"])
def test_a_response_that_repeats_itself_for_ever_is_graded_in_no_time(loop, reference):
    before = time.process_time()
    assert not grade(loop * 5000, reference).correct
    assert time.process_time() - before < 0.5


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_reference_whatever_breaks_it_either(reference, question):
    found = grade("The answer is 3.", reference, question=question)
    assert found is None or 0.0 <= found.score <= 1.0


@given(st.integers(0, 99_999_999))
def test_chinese_numerals_are_read_back(value):
    assert [number.value for number in answers.numbers(in_chinese(value))] == [float(value)]


def in_chinese(value: int) -> str:
    """Ordinary Chinese numerals below 10**8, written independently of the reader."""
    digits = "零一二三四五六七八九"
    if value < 10:
        return digits[value]
    if value >= 10_000:
        high, low = divmod(value, 10_000)
        gap = "零" if 0 < low < 1000 else ""
        return in_chinese(high) + "万" + gap + (in_chinese(low) if low else "")
    unit, name = next((u, n) for u, n in ((1000, "千"), (100, "百"), (10, "十")) if value >= u)
    high, low = divmod(value, unit)
    gap = "零" if 0 < low < unit // 10 else ""
    return digits[high] + name + gap + (in_chinese(low) if low else "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("十五", 15),
        ("两万", 20000),
        ("负三", -3),
        ("三点一四", 3.14),
        ("二〇二四年", 2024),
        ("twenty-one", 21),
        ("one hundred and five", 105),
        ("two thousand", 2000),
        ("1.5e3", 1500),
        ("５", 5),
    ],
)
def test_numbers_are_read_in_many_spellings(text, value):
    assert [number.value for number in answers.numbers(text)] == [pytest.approx(value)]


@pytest.mark.parametrize("text", ["它们一起玩", "十分好看", "version", "model X5", "anyone"])
def test_words_that_merely_hold_a_number_are_none(text):
    assert answers.numbers(text) == []
