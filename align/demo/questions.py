"""Canvases in, questions with checkable answers out, and the rule that judges a response.

Five tasks: list the digits from left to right, count them, name the largest, say whether one is there, describe the
picture. Each has two phrasings, and the answer follows the question's phrasing, so exactly one text is right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

TASKS = ("list", "count", "largest", "has", "describe")
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six")

PHRASINGS: dict[str, tuple[str, str]] = {
    "list": ("List the digits from left to right.", "Which digits do you see?"),
    "count": ("How many digits are there?", "How many digits do you see?"),
    "largest": ("Which digit is the largest?", "What is the largest digit?"),
    "has": ("Is there a {asked}?", "Do you see a {asked}?"),
    "describe": ("Describe the picture.", "What is in the picture?"),
}


@dataclass(frozen=True)
class Task:
    """One thing asked about a picture whose digits are `digits` from left to right."""

    kind: str
    phrasing: int
    digits: tuple[int, ...]
    asked: int | None = None

    @property
    def question(self) -> str:
        """The text of the question."""
        return PHRASINGS[self.kind][self.phrasing].format(asked=self.asked)

    @property
    def answer(self) -> str:
        """The one right answer.

        >>> Task("describe", 0, (3, 7)).answer
        'The picture shows two digits: 3 and 7.'
        >>> Task("has", 1, (3, 7), asked=4).answer
        'No, I see no 4.'
        """
        return say(self, self.digits)


def say(task: Task, seen: Sequence[int], *, number: int | None = None, present: bool | None = None) -> str:
    """What a respondent says who sees `seen`, counts `number` digits and finds the asked digit `present`.

    Left out, `number` is the length of `seen` and `present` whether `seen` holds the digit. The answer to "which is
    the largest" is the largest of `seen`.
    """
    number = len(seen) if number is None else number
    if task.kind == "list":
        return _list_sentence(task.phrasing, seen)
    if task.kind == "count":
        return _count_sentence(task.phrasing, number)
    if task.kind == "largest":
        return ("The largest digit is {}.", "It is {}.")[task.phrasing].format(max(seen))
    if task.kind == "has":
        return _has_sentence(task, task.asked in seen if present is None else present)
    opening = ("The picture shows {}: {}.", "I see {}: {}.")[task.phrasing]
    return opening.format(_number_of_digits(number), join(seen))


def join(digits: Sequence[int]) -> str:
    """Digits as one writes them in a sentence.

    >>> join([3, 7, 2])
    '3, 7 and 2'
    """
    words = [str(digit) for digit in digits]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _number_of_digits(number: int) -> str:
    return f"{NUMBER_WORDS[number]} {'digit' if number == 1 else 'digits'}"


def _list_sentence(phrasing: int, seen: Sequence[int]) -> str:
    if phrasing == 1:
        return f"I see {join(seen)}."
    return f"The digit is {join(seen)}." if len(seen) == 1 else f"The digits are {join(seen)}."


def _count_sentence(phrasing: int, number: int) -> str:
    if phrasing == 1:
        return f"I see {_number_of_digits(number)}."
    return f"There {'is' if number == 1 else 'are'} {_number_of_digits(number)}."


def _has_sentence(task: Task, present: bool) -> str:
    if task.phrasing == 1:
        return f"Yes, I see a {task.asked}." if present else f"No, I see no {task.asked}."
    return f"Yes, there is a {task.asked}." if present else f"No, there is no {task.asked}."


def make_task(rng: random.Random, kind: str, digits: Sequence[int]) -> Task:
    """A task of `kind` about these digits; a digit asked for is there half of the time."""
    asked = None
    if kind == "has":
        absent = [digit for digit in range(10) if digit not in digits]
        asked = rng.choice(list(digits)) if rng.random() < 0.5 else rng.choice(absent)
    return Task(kind, rng.randrange(2), tuple(digits), asked)


def named_digits(response: str) -> set[int]:
    """Digits that a response says are there; one that it says is absent ("no 4") is not among them.

    >>> sorted(named_digits("The digits are 3, 7 and 3."))
    [3, 7]
    >>> named_digits("No, there is no 4.")
    set()
    """
    return {int(word) for word in re.findall(r"(?<!no )\b\d\b", response.lower())}


def absent_words(task: Task) -> list[str]:
    """Words that claim something absent from the picture: digits that are not there, and "yes" where it is untrue.

    The digit asked for is left out, since a true answer names it too ("no 4").

    >>> absent_words(Task("has", 0, (0, 1, 2, 3, 5, 6), asked=4))
    ['7', '8', '9', 'yes']
    """
    words = [str(digit) for digit in range(10) if digit not in task.digits and digit != task.asked]
    return [*words, "yes"] if task.kind == "has" and task.asked not in task.digits else words


def is_exact(task: Task, response: str) -> bool:
    """Whether the response is the right answer (spaces around it and letter case do not matter)."""
    return " ".join(response.split()).lower() == task.answer.lower()


def hallucinates(task: Task, response: str) -> bool:
    """Whether the response names a digit that is not in the picture."""
    return bool(named_digits(response) - set(task.digits))
