"""Comparison with a reference answer by rule: responses in; 1 (right) or 0 (wrong) out, no model needed.

A response from which no answer can be read is wrong: it did not answer. An item whose reference answer is missing or
is not of the kind asked for is unscored: there the verifier failed, not the response.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from reward import answers
from reward.critics.base import NO_REFERENCE, BaseCritic, Item, Judgement
from reward.errors import RewardError
from reward.judgement import all_unscored
from reward.texts import normalise


@dataclass(frozen=True)
class Grade:
    """How good an answer is (0 to 1), whether it counts as right, what was read from it, and how it was compared."""

    score: float
    correct: bool
    read: str | None
    kind: str


@dataclass(frozen=True)
class _Case:
    reference: str
    response: str
    question: str
    tolerance: float
    min_iou: float


@dataclass(frozen=True)
class _Outcome:
    score: float
    correct: bool
    read: Any


_WRONG = _Outcome(0.0, False, None)


def _same(correct: bool, read: Any) -> _Outcome:
    return _Outcome(float(correct), correct, read)


def _exact(case: _Case) -> _Outcome:
    return _same(answers.same_words(case.reference, case.response), case.response)


def _contains(case: _Case) -> _Outcome:
    wanted, words = normalise(case.reference), normalise(case.response)
    pattern = rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9])"
    return _same(bool(wanted) and re.search(pattern, words) is not None, case.response)


def _yes_no(case: _Case) -> _Outcome | None:
    wanted, found = answers.yes_or_no(case.reference), answers.yes_or_no(case.response)
    if wanted is None:
        return None
    return _WRONG if found is None else _same(found == wanted, "yes" if found else "no")


def _number(case: _Case) -> _Outcome | None:
    wanted, found = answers.numbers(case.reference), answers.numbers(case.response)
    if not wanted:
        return None
    # Of several numbers the last is the answer: working comes before the result.
    return _same(_equal(wanted[-1], found[-1], case.tolerance), found[-1].value) if found else _WRONG


def _numbers(case: _Case) -> _Outcome | None:
    wanted, found = answers.numbers(case.reference), answers.numbers(case.response)
    if not wanted:
        return None
    same = len(wanted) == len(found) and all(
        _equal(one, other, case.tolerance) for one, other in zip(wanted, found, strict=True)
    )
    return _same(same, [number.value for number in found])


def _equal(wanted: answers.Number, found: answers.Number, tolerance: float) -> bool:
    """Equal within `tolerance` of the wanted value; 50 %, 50 and 0.5 are the same where one of the two has the sign."""
    values = [found.value]
    if wanted.percent and not found.percent:
        values.append(found.value * 100)
    if found.percent and not wanted.percent:
        values.append(found.value / 100)
    return any(
        math.isclose(value, wanted.value, rel_tol=1e-9, abs_tol=_room(wanted.value, tolerance)) for value in values
    )


def _room(value: float, tolerance: float) -> float:
    return max(abs(value) * tolerance, 1e-9)


def _choice(case: _Case) -> _Outcome | None:
    options = answers.options_of(case.question)
    wanted = answers.option_letter(case.reference, options)
    if wanted is None:
        return None
    found = answers.option_letter(case.response, options)
    return _WRONG if found is None else _same(found == wanted, found)


_SEPARATOR = re.compile(r"[,;、，；\n]|\band\b|和|以及|与")


def _members(text: str) -> set[str]:
    parts = _SEPARATOR.split(text.strip().strip("{}[]()"))
    return {normalise(part) for part in parts} - {""}


def _set(case: _Case) -> _Outcome | None:
    wanted, found = _members(case.reference), _members(case.response)
    if not wanted:
        return None
    score = 2 * len(wanted & found) / (len(wanted) + len(found))
    return _Outcome(score, wanted == found, sorted(found))


def _boxes(case: _Case) -> _Outcome | None:
    wanted, found = answers.boxes(case.reference), answers.boxes(case.response)
    if not wanted:
        return None
    overlaps = _matched(wanted, found)
    score = sum(overlaps) / max(len(wanted), len(found))
    right = len(wanted) == len(found) == sum(overlap >= case.min_iou for overlap in overlaps)
    return _Outcome(score, right, [list(box) for box in found])


def _matched(wanted: list[answers.Box], found: list[answers.Box]) -> list[float]:
    """IoU of each wanted box with its own found one; the best overlaps are matched first."""
    grid = sorted(
        ((iou(one, other), row, column) for row, one in enumerate(wanted) for column, other in enumerate(found)),
        key=lambda cell: (-cell[0], cell[1], cell[2]),
    )
    rows: set[int] = set()
    columns: set[int] = set()
    overlaps = []
    for overlap, row, column in grid:
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
            overlaps.append(overlap)
    return overlaps


def iou(one: answers.Box, other: answers.Box) -> float:
    """Intersection over union of two boxes.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    union = areas - width * height
    return width * height / union if union > 0 else 0.0


ANSWER_KINDS: dict[str, Callable[[_Case], _Outcome | None]] = {
    "exact": _exact,
    "contains": _contains,
    "yes_no": _yes_no,
    "number": _number,
    "numbers": _numbers,
    "choice": _choice,
    "set": _set,
    "boxes": _boxes,
}

_ONE_LETTER = re.compile(r"^[\s(\[]*[A-J][\s)\].:]*$")
_LETTER_AND_TEXT = re.compile(r"^\s*(?:\([A-J]\)|[A-J][.:)])\s*\S")
_JUST_YES_NO = re.compile(r"^\W*(?:yes|no|true|false|是|是的|有|对|不是|没有|否|不|不对|无)\W*$", re.IGNORECASE)
_ONLY_SEPARATORS = re.compile(r"^(?:[\s,;、，；.。]|and|和|与)*$", re.IGNORECASE)
_UNIT = re.compile(r"^\s*[^\W\d_]*\s*[.。]?\s*$")


def answer_kind(reference: str, question: str = "") -> str:
    """The kind that a reference answer looks like; `contains` is never guessed.

    >>> [answer_kind(text) for text in ("B", "yes", "3 cm", "3, 7 and 2", "{red, blue}", "[1, 2, 3, 4]", "a red car")]
    ['choice', 'yes_no', 'number', 'numbers', 'set', 'boxes', 'exact']
    >>> answer_kind("a dog", "What? A. a cat B. a dog"), answer_kind("二十只")
    ('choice', 'number')
    """
    kind, options = _kind_by_itself(reference), answers.options_of(question)
    if options and kind not in ("boxes", "choice"):
        text = answers.final_answer(reference)
        if _LETTER_AND_TEXT.match(text) or _is_option(text, options):
            return "choice"
    return kind


@lru_cache(maxsize=1024)
def _kind_by_itself(reference: str) -> str:
    """What a reference answer looks like where the question lists no options."""
    text = answers.final_answer(reference)
    if answers.boxes(text) and not re.search(r"\w", re.sub(r"</?\w+>", "", answers.without_boxes(text))):
        return "boxes"
    if _ONE_LETTER.match(text):
        return "choice"
    if _JUST_YES_NO.match(text):
        return "yes_no"
    if text.startswith("{") and text.endswith("}"):
        return "set"
    return _number_kind(text) or "exact"


def _is_option(text: str, options: dict[str, str]) -> bool:
    return any(answers.same_words(text, option) for option in options.values())


def _number_kind(text: str) -> str | None:
    found = answers.numbers(text)
    if not found:
        return None
    ends = [0, *(number.end for number in found)]
    starts = [*(number.start for number in found), len(text)]
    between = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    if len(found) == 1:
        return "number" if not between[0].strip("$€£¥ ") and _UNIT.match(between[1]) else None
    return "numbers" if all(_ONLY_SEPARATORS.match(gap) for gap in between) else None


def grade(
    response: str,
    reference: str,
    *,
    question: str = "",
    kind: str | None = None,
    tolerance: float = 0.0,
    min_iou: float = 0.5,
) -> Grade | None:
    """Compare a response with the reference answer; None if the reference is not of the given kind.

    `kind` is one of ANSWER_KINDS, or None to go by the reference's looks. `tolerance` is relative to the wanted
    number. A set's score is its F1, a box's its IoU; whether it is right is all or nothing (IoU from `min_iou`).

    >>> grade("I count 3 cats, so **Answer: three**", "3").correct
    True
    """
    found_kind = kind or answer_kind(reference, question)
    if found_kind not in ANSWER_KINDS:
        raise RewardError(f"answer kind must be one of {', '.join(ANSWER_KINDS)}, found {found_kind!r}")
    wanted, answer = answers.final_answer(reference), answers.final_answer(response)
    outcome = ANSWER_KINDS[found_kind](_Case(wanted, answer, question, tolerance, min_iou))
    if outcome is None:
        return None
    return Grade(outcome.score, outcome.correct, None if outcome.read is None else str(outcome.read), found_kind)


def is_correct(response: str, reference: str, *, question: str = "", kind: str | None = None) -> bool | None:
    """Whether a response is right by the reference answer; None if that is not of the given kind."""
    found = grade(response, reference, question=question, kind=kind)
    return None if found is None else found.correct


class VerifierCritic(BaseCritic):
    """Rewards 1 for a right answer and 0 for a wrong one.

    kind: one of ANSWER_KINDS for all items; None: the item's own `answer_kind`, else by the reference's looks.
    tolerance: how far a number may be off, relative to the reference (0.05: 5 %).
    min_iou: overlap from which a box is right.
    partial: reward sets by F1 and boxes by IoU instead of 1 or 0.
    """

    kind: Literal["exact", "contains", "yes_no", "number", "numbers", "choice", "set", "boxes"] | None = None
    tolerance: float = Field(0.0, ge=0, lt=1)
    min_iou: float = Field(0.5, gt=0, le=1)
    partial: bool = False

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        return [self._judge_one(item) for item in items]

    def _judge_one(self, item: Item) -> Judgement:
        if item.answer is None or not item.answer.strip():
            return _unjudged(item, NO_REFERENCE)
        kind = self.kind or item.answer_kind or answer_kind(item.answer, item.question)
        grades = []
        for response in item.responses:
            found = grade(
                response,
                item.answer,
                question=item.question,
                kind=kind,
                tolerance=self.tolerance,
                min_iou=self.min_iou,
            )
            if found is None:
                return _unjudged(item, f"the reference answer is not of kind {kind}")
            grades.append(found)
        rewards: list[float | None] = [g.score if self.partial else float(g.correct) for g in grades]
        evidence = {"kind": kind, "read": [g.read for g in grades], "correct": [g.correct for g in grades]}
        return Judgement(id=item.id, rewards=rewards, evidence=evidence)


def _unjudged(item: Item, reason: str) -> Judgement:
    return all_unscored(item, reason, {"correct": [None] * len(item.responses)})
