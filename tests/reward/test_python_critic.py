"""A function as the critic: what it may return, what it may raise, and how a file with one is checked."""

from __future__ import annotations

import numpy as np
import pytest

from reward.critics import Item, make_critic
from reward.critics.python import NO_NUMBER, NOT_FINITE, NOT_JUDGED, PythonCritic
from reward.errors import RewardError

ITEM = Item("q", "How many?", ("a.png",), ("one", "two", "three"), answer="2")


def judged(function, item=ITEM, **more):
    [judgement] = PythonCritic(function=function, **more).judge([item])
    return judgement


@pytest.mark.parametrize(
    ("returned", "rewards", "reasons"),
    [
        ([1, 2.5, 0], [1.0, 2.5, 0.0], {}),
        ((1.0, None, 3.0), [1.0, None, 3.0], {1: NOT_JUDGED}),
        (np.array([1.0, np.nan, np.inf]), [1.0, None, None], {1: NOT_FINITE, 2: NOT_FINITE}),
        ([True, False, np.float32(0.5)], [1.0, 0.0, 0.5], {}),
        (["good", "1", [1, 2]], [None] * 3, dict.fromkeys(range(3), NO_NUMBER)),
        ([1.0, 2.0], [None] * 3, dict.fromkeys(range(3), "the function returned 2 rewards for 3 responses")),
        (None, [None] * 3, dict.fromkeys(range(3), "the function returned NoneType, expected a list of rewards")),
        ("abc", [None] * 3, dict.fromkeys(range(3), "the function returned 3 rewards for 3 responses")),
        (7, [None] * 3, dict.fromkeys(range(3), "the function returned int, expected a list of rewards")),
    ],
)
def test_what_a_function_returns_is_a_reward_or_has_a_reason(returned, rewards, reasons):
    judgement = judged(lambda question, images, responses: returned)
    assert judgement.rewards == rewards
    assert judgement.unscored == reasons


def test_a_function_is_given_the_question_opened_images_and_responses_and_the_answer_where_it_asks_for_it():
    seen = []

    def function(question, images, responses, *, answer):
        seen.append((question, images, responses, answer))
        return [float(answer in response) for response in responses]

    judged(function, open_image=lambda path: f"picture of {path}")
    assert seen == [("How many?", ["picture of a.png"], ["one", "two", "three"], "2")]


def test_an_exception_leaves_the_question_unscored_and_names_kind_and_line():
    def function(question, images, responses):
        return [1 / 0 for _ in responses]

    judgement = judged(function)
    [reason] = set(judgement.unscored.values())
    assert reason.startswith("the function raised ZeroDivisionError (test_python_critic.py, line ")
    assert judgement.evidence["error"] == "division by zero"
    assert judgement.rewards == [None] * 3


def write(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return f"{tmp_path / name}:judge"


GOOD = "def judge(question, images, responses):\n    return [len(r) for r in responses]\n"


def test_a_function_is_loaded_from_a_file_and_may_import_what_lies_beside_it(tmp_path):
    write(tmp_path, "WEIGHT = 2\n", "beside_my_critic.py")
    function = write(tmp_path, "from beside_my_critic import WEIGHT\n" + GOOD.replace("len(r)", "WEIGHT * len(r)"))
    [judgement] = make_critic("python", {"function": function}).judge([ITEM])
    assert judgement.rewards == [6.0, 6.0, 10.0]


def test_a_changed_file_is_loaded_anew(tmp_path):
    import os

    function = write(tmp_path, GOOD)
    assert make_critic("python", {"function": function}).judge([ITEM])[0].rewards == [3.0, 3.0, 5.0]
    write(tmp_path, GOOD.replace("len(r)", "-len(r)"))
    os.utime(tmp_path / "mine.py", ns=(1, 1))
    assert make_critic("python", {"function": function}).judge([ITEM])[0].rewards == [-3.0, -3.0, -5.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(question, images, responses): ...\n", r"has no function 'judge'; it has: other"),
        ("judge = 3\n", "expected a function"),
        ("def judge(question): ...\n", r"\(question\) cannot be called as judge\(question, images, responses\)"),
        ("def judge(question, images, responses, weight): ...\n", "missing a required argument: 'weight'"),
        ("async def judge(question, images, responses): ...\n", "coroutine"),
        ("import nothing_of_the_kind\n", "cannot be imported: ModuleNotFoundError"),
        ("def judge(:\n", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)\n", "cannot be imported: SystemExit"),
    ],
)
def test_a_file_that_will_not_do_is_told_before_anything_is_judged(tmp_path, text, message):
    with pytest.raises(RewardError, match=message):
        make_critic("python", {"function": write(tmp_path, text)})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mine.py", "must be a file and a name in it, as in my_critic.py:judge"),
        ("mine.txt:judge", "must be a file"),
        ("nowhere/mine.py:judge", "there is no file nowhere/mine.py"),
    ],
)
def test_a_function_that_is_named_wrongly_is_told(function, message):
    with pytest.raises(RewardError, match=message):
        make_critic("python", {"function": function})


def test_a_python_critic_needs_its_function():
    with pytest.raises(RewardError, match="critic python: function must be given"):
        make_critic("python")
