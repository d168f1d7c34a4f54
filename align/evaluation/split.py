"""Held-out questions in; those that decide, apart from those that give the reported numbers, out.

A number that has chosen among checkpoints is too good: of several that are equally good, the one that chance favours on
these very questions is taken. So where anything is decided by held-out numbers (gates, stopping, `select: best`), some
questions are set apart for it, and what is reported comes from the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence

from align.config import Config
from align.errors import UserError
from align.media.images import ImageStore, evaluation_images, file_of
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
    found = deciding_questions(questions, config.evaluate.decision_share, evaluation_images(config))
    if not found:
        raise UserError(
            "the held-out questions cannot be split into those that decide and those that are reported: "
            + ("there is only one" if len(questions) == 1 else "all of them are about one image"),
            where=str(config.evaluate.questions),
            fix="add questions about other images, or take evaluate.gates, stop_if_worse and select out",
        )
    return found


def deciding_questions(questions: Sequence[Question], share: float, images: ImageStore | None = None) -> set[str]:
    """About `share` of the questions, at least one; none where they cannot be taken apart.

    Questions about the same image or video stay together, under whatever names it goes. Which part they are in is drawn
    from the contents of its file (of one that `images` cannot read, or of a folder of frames, from its name; without
    any, from the question's id) alone, so that it is the same in every round and run, in whatever order they come and
    whatever the seed.

    >>> questions = [Question(id=f"q{n}", question="?", images=[f"{n // 2}.png"]) for n in range(8)]
    >>> sorted(deciding_questions(questions, 0.5)), deciding_questions(questions[:2], 0.5)
    (['q0', 'q1', 'q4', 'q5', 'q6', 'q7'], set())
    """
    shown = {question.id: _shown(question, images) for question in questions}
    groups = _groups(shown.values())
    drawn = sorted((_draw(min(group)), group) for group in {id(group): group for group in groups.values()}.values())
    # At least one of each, where there are two.
    count = min(max(1, sum(number < share for number, _ in drawn)), len(drawn) - 1)
    deciding = {picture for _, group in drawn[: max(count, 0)] for picture in group}
    return {id_ for id_, pictures in shown.items() if deciding.intersection(pictures)}


def part_notes(num_deciding: int, num_reported: int) -> dict[str, str]:
    """What a manifest says of the two parts."""
    text = f"{num_deciding} held-out questions decide, {num_reported} others give the reported numbers"
    small = min(num_deciding, num_reported)
    return {PARTS: text + (f"; {small} are too few (below {MIN_COUNT})" if small < MIN_COUNT else "")}


def _groups(shown: Iterable[Sequence[str]]) -> dict[str, set[str]]:
    """By picture all pictures that questions hold together, directly or through others."""
    groups: dict[str, set[str]] = {}
    for pictures in shown:
        group = set(pictures)
        for picture in pictures:
            group |= groups.get(picture, set())
        groups |= dict.fromkeys(group, group)
    return groups


def _shown(question: Question, images: ImageStore | None) -> list[str]:
    """What stands for each picture or video of a question: the hash of its file, or its name."""
    files = [*map(file_of, question.images), *([question.video] if question.video else [])]
    return [_identity(file, images) for file in files] or [f"question {question.id}"]


def _identity(file: str, images: ImageStore | None) -> str:
    if images is not None:
        with contextlib.suppress(UserError, OSError):
            return images.sha256(file)
    return os.path.normpath(file)


def _draw(picture: str) -> float:
    """A number from 0 to 1."""
    return int(hashlib.sha256(f"decides\n{picture}".encode()).hexdigest()[:12], 16) / 16**12
