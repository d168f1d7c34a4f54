"""Held-out questions in; those that decide, apart from those that give the reported numbers, out.

A number that has chosen among checkpoints is too good: of several that are equally good, the one that chance favours on
these very questions is taken. So where anything is decided by held-out numbers (gates, stopping, `select: best`), some
questions are set apart for it, and what is reported comes from the others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from align.config import Config
from align.errors import UserError
from align.media.images import file_of
from align.records import Question
from reward.reliability import MIN_COUNT

# Under which name a manifest notes how many questions are in either part.
PARTS = "held-out questions"


def split_of(config: Config, questions: Sequence[Question]) -> set[str] | None:
    """The ids of the questions that decide; None where nothing does, and all of them give the reported numbers.

    Raises:
        UserError: all questions are about one image, so that none can be set apart.
    """
    if not config.evaluate.decides:
        return None
    found = deciding_questions(questions, config.evaluate.decision_share)
    if not found:
        raise UserError(
            "the held-out questions cannot be split into those that decide and those that are reported: "
            + ("there is only one" if len(questions) == 1 else "all of them are about one image"),
            where=str(config.evaluate.questions),
            fix="add questions about other images, or take evaluate.gates, stop_if_worse and select out",
        )
    return found


def deciding_questions(questions: Sequence[Question], share: float) -> set[str]:
    """About `share` of the questions, at least one; none where they cannot be taken apart.

    Questions about the same image or video stay together. Which part they are in is drawn from the name of the image
    (without one, from the question's id) alone, so that it is the same in every round and run, in whatever order they
    come and whatever the seed.

    >>> questions = [Question(id=f"q{n}", question="?", images=[f"{n // 2}.png"]) for n in range(8)]
    >>> sorted(deciding_questions(questions, 0.5)), deciding_questions(questions[:2], 0.5)
    (['q0', 'q1', 'q4', 'q5', 'q6', 'q7'], set())
    """
    groups = _groups(questions)
    drawn = sorted((_draw(min(names)), names) for names in {id(names): names for names in groups.values()}.values())
    # At least one of each, where there are two.
    count = min(max(1, sum(number < share for number, _ in drawn)), len(drawn) - 1)
    deciding = {name for _, names in drawn[: max(count, 0)] for name in names}
    return {question.id for question in questions if deciding.intersection(_names(question))}


def part_notes(num_deciding: int, num_reported: int) -> dict[str, str]:
    """What a manifest says of the two parts."""
    text = f"{num_deciding} held-out questions decide, {num_reported} others give the reported numbers"
    small = min(num_deciding, num_reported)
    return {PARTS: text + (f"; {small} are too few (below {MIN_COUNT})" if small < MIN_COUNT else "")}


def _groups(questions: Sequence[Question]) -> dict[str, set[str]]:
    """By name of an image all names of images that questions hold together, directly or through others."""
    groups: dict[str, set[str]] = {}
    for question in questions:
        names = set(_names(question))
        for name in list(names):
            names |= groups.get(name, set())
        groups |= dict.fromkeys(names, names)
    return groups


def _names(question: Question) -> list[str]:
    shown = [*map(file_of, question.images), *([question.video] if question.video else [])]
    return [os.path.normpath(name) for name in shown] or [f"question {question.id}"]


def _draw(name: str) -> float:
    """A number from 0 to 1."""
    return int(hashlib.sha256(f"decides\n{name}".encode()).hexdigest()[:12], 16) / 16**12
