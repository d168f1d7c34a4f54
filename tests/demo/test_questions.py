import random

import pytest

from align.demo.questions import PHRASINGS, TASKS, Task, absent_words, hallucinates, is_exact, make_task, say
from align.statistics import words
from reward.critics.verifier import grade


def tasks(number: int = 400) -> list[Task]:
    rng = random.Random(0)
    return [
        make_task(rng, kind, [rng.randrange(10) for _ in range(rng.randint(1, 4))]) for kind in TASKS * (number // 5)
    ]


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (Task("list", 0, (3, 7, 2)), "The digits are 3, 7 and 2."),
        (Task("list", 0, (3,)), "The digit is 3."),
        (Task("list", 1, (3, 3)), "I see 3 and 3."),
        (Task("count", 0, (5,)), "There is one digit."),
        (Task("count", 1, (5, 1, 0, 0)), "I see four digits."),
        (Task("largest", 0, (3, 9, 2)), "The largest digit is 9."),
        (Task("has", 0, (3, 9), asked=9), "Yes, there is a 9."),
        (Task("has", 1, (3, 9), asked=4), "No, I see no 4."),
        (Task("describe", 1, (3, 9)), "I see two digits: 3 and 9."),
    ],
)
def test_the_answer_is_what_one_sees(task, answer):
    assert task.answer == answer
    assert is_exact(task, answer)
    assert not hallucinates(task, answer)


@pytest.mark.parametrize(
    ("task", "response", "invented"),
    [
        (Task("list", 0, (3, 7)), "The digits are 7 and 3.", False),
        (Task("list", 0, (3, 7)), "The digits are 3, 7 and 1.", True),
        (Task("count", 0, (3, 7)), "There are three digits.", False),
        (Task("largest", 0, (3, 7)), "The largest digit is 3.", False),
        (Task("largest", 0, (3, 7)), "The largest digit is 9.", True),
        (Task("has", 0, (3, 7), asked=4), "Yes, there is a 4.", True),
        (Task("has", 0, (3, 7), asked=7), "No, there is no 7.", False),
        (Task("describe", 0, (3, 7)), "The picture shows three digits: 3 and 7.", False),
    ],
)
def test_wrong_answers_are_not_exact_and_inventions_are_told_apart(task, response, invented):
    assert not is_exact(task, response)
    assert hallucinates(task, response) is invented


def test_absent_words_find_the_same_inventions_as_the_rule():
    rng = random.Random(1)
    for task in tasks():
        seen = [rng.randrange(10) for _ in range(rng.randint(1, 4))]
        response = say(task, seen, present=rng.random() < 0.5)
        assert bool(set(words(response)) & set(absent_words(task))) == hallucinates(task, response), (task, response)


def test_the_verifier_agrees_with_the_rule():
    rng = random.Random(2)
    for task in tasks(200):
        for response in (task.answer, say(task, [rng.randrange(10) for _ in range(2)])):
            found = grade(response, task.answer, question=task.question, kind="exact")
            assert found is not None
            assert found.correct == is_exact(task, response)


def test_a_digit_asked_for_is_there_half_of_the_time():
    rng = random.Random(3)
    there = [task.asked in task.digits for task in (make_task(rng, "has", [1, 2, 2]) for _ in range(1000))]
    assert 430 < sum(there) < 570


def test_every_task_has_two_phrasings():
    assert set(PHRASINGS) == set(TASKS)
    assert all(len(set(phrasings)) == 2 for phrasings in PHRASINGS.values())
