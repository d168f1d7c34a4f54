"""A task and a response in, how far the response is from the answer and which of its words are wrong out.

It is what the demo's critic is taught, and what it is held against (`scripts/demo_consistency.py`). How long a response
is counts for nothing by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from align.demo.questions import NUMBER_WORDS, Task, hallucinates, is_exact, say
from demo_build.words import WORD

#: A digit that is not in the picture costs most, since that is what the demo measures beside right answers; one that is
#: left out, twice there or in the wrong place costs half, as does a sentence that the question does not ask for.
INVENTED, SLIP = 1.0, 0.5
MOST = 4.0
#: In log-odds of being preferred: what the right answer is above a response whose faults cost nothing, and what a cost
#: of 1 takes away.
RIGHT_MERIT, MERIT_PER_COST = 2.0, 1.2


@dataclass(frozen=True)
class Faults:
    """`cost` is 0 for the right answer; `marks` say by place among the words that carry the answer which are right."""

    cost: float
    marks: tuple[tuple[int, bool], ...]


@lru_cache(maxsize=200_000)
def faults(task: Task, response: str) -> Faults:
    """What is wrong with a response.

    >>> faults(Task("list", 1, (3, 7)), "I see 3, 7 and 9.")
    Faults(cost=1.0, marks=((2, True), (4, True), (6, False)))
    >>> faults(Task("describe", 1, (3, 7)), "I see one digit: 7.")
    Faults(cost=0.5, marks=((2, False), (5, True)))
    """
    words = [word.strip() for word in WORD.findall(response)]
    digits = [at for at, word in enumerate(words) if word.isdigit()]
    numbers = [at for at, word in enumerate(words) if word in NUMBER_WORDS]
    number = NUMBER_WORDS.index(words[numbers[0]]) if numbers else None
    said = [int(words[at]) for at in digits]
    cost, marks = 0.0, {}
    if task.kind in ("list", "describe"):
        cost, kept = _aligned(said, task.digits)
        marks = dict(zip(digits, kept, strict=True))
    if task.kind == "describe" and number is not None:
        marks[numbers[0]] = number == len(task.digits)
        cost += 0.0 if number == len(said) else SLIP
    if task.kind == "count":
        off = MOST if number is None else abs(number - len(task.digits))
        cost, marks = min(off, 3.0), dict.fromkeys(numbers[:1], off == 0)
    if task.kind in ("has", "largest") and not is_exact(task, response):
        cost = INVENTED if hallucinates(task, response) else SLIP
    if task.kind == "largest":
        marks = dict.fromkeys(digits[:1], is_exact(task, response))
    if task.kind == "has" and words:
        marks = {0: is_exact(task, response)}
    if not _is_sentence(task, response, said, number):
        return Faults(min(cost + SLIP, MOST), ())
    return Faults(min(cost, MOST), tuple(sorted(marks.items())))


def _is_sentence(task: Task, response: str, said: Sequence[int], number: int | None) -> bool:
    """Whether somebody could answer the question so, who sees and counts what the response says."""
    seen = said or task.digits
    number = min(len(seen), len(NUMBER_WORDS) - 1) if number is None else number
    return response in [say(task, seen, number=number, present=present) for present in (True, False)]


def _aligned(said: Sequence[int], seen: Sequence[int]) -> tuple[float, list[bool]]:
    """The cost of the cheapest way from `seen` to `said`, and which digits of `said` it keeps (Levenshtein)."""
    bad = [SLIP if digit in seen else INVENTED for digit in said]
    costs = [[0.0] * (len(seen) + 1) for _ in range(len(said) + 1)]
    steps: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(len(said) + 1):
        for j in range(len(seen) + 1):
            ways = []
            if i and j:
                ways.append((costs[i - 1][j - 1] + (0.0 if said[i - 1] == seen[j - 1] else bad[i - 1]), (i - 1, j - 1)))
            if i:
                ways.append((costs[i - 1][j] + bad[i - 1], (i - 1, j)))
            if j:
                ways.append((costs[i][j - 1] + SLIP, (i, j - 1)))
            if ways:
                costs[i][j], steps[i, j] = min(ways, key=lambda way: way[0])
    at, kept = (len(said), len(seen)), [False] * len(said)
    while at in steps:
        i, j = steps[at]
        if (at[0] - i, at[1] - j) == (1, 1):
            kept[i] = said[i] == seen[j]
        at = i, j
    return costs[-1][-1], kept


def merit(task: Task, response: str) -> float:
    """How good a response is in log-odds: what one is above another says how often it ought to be preferred.

    >>> task = Task("list", 1, (3, 7))
    >>> [merit(task, f"I see {said}.") for said in ("3 and 7", "3", "3 and 9", "3, 7, 1 and 9")]
    [2.0, -0.6, -1.2, -2.4]
    """
    cost = faults(task, response).cost
    return -MERIT_PER_COST * cost if cost else RIGHT_MERIT


def quality(task: Task, response: str) -> float:
    """The same as one number from 0 to 1: 1 for the right answer, below 0.5 for all others."""
    cost = faults(task, response).cost
    return 0.6 * math.exp(-0.7 * cost) if cost else 1.0
