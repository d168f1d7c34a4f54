"""Samples and scores in, every sampled question with its judgement out: joined by id.

Both are files that people may filter, reorder and edit between the stages, so the place of a line means nothing, and
what does not fit together is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from align.errors import UserError
from align.records import Samples
from align.run.hashes import text_hash
from reward.judgement import Judgement


class Scored(NamedTuple):
    """What pairs are made of: rewards, known correctness and what was judged; verdicts and reasons are left behind."""

    rewards: tuple[float | None, ...]
    correct: Any
    judged: str | None


def scores_by_id(scores: Iterable[Judgement], where: str) -> dict[str, Scored]:
    """Every judgement by its question.

    Raises:
        UserError: a question has two lines.
    """
    found: dict[str, Scored] = {}
    for line in scores:
        if line.id in found:
            raise UserError(f"the question {line.id} is scored twice", where=where, fix="remove one of its two lines")
        found[line.id] = Scored(tuple(line.rewards), line.evidence.get("correct"), line.judged)
    return found


def join_scores(
    samples: Iterable[Samples], scores: dict[str, Scored], number: int, *, where: str
) -> Iterator[tuple[Samples, Scored | None]]:
    """Every question of a round with its judgement, None where it has none, in the order of `samples`.

    Raises:
        UserError: a question was sampled twice, or its judgement is not about as many responses as it has.
    """
    seen: set[str] = set()
    for line in samples:
        if line.id in seen:
            raise UserError(f"the question {line.id} is sampled twice", where=where, fix="remove one of its two lines")
        seen.add(line.id)
        score = scores.get(line.id)
        if score is not None:
            _check_size(line, score, number, where)
        yield line, score


def is_about(score: Judgement | Scored, line: Samples) -> bool:
    """Whether a judgement is of these very responses; where it does not say, as one that was written elsewhere, of as
    many."""
    same = score.judged is None or score.judged == judged_hash(line)
    return same and len(score.rewards) == len(line.responses)


def judged_hash(line: Samples) -> str:
    """What says that a critic judged these responses: a hash of the question, its images' names and the texts."""
    question = line.question
    return text_hash(question.as_text(), *question.images, *(response.text for response in line.responses))


def _check_size(line: Samples, score: Scored, number: int, where: str) -> None:
    num, correct = len(line.responses), score.correct
    fix = (
        "take its line out of the scores (it then makes no pair), or judge it again: align score"
        f" --round {number} --redo"
    )
    for name, values in (("rewards", score.rewards), ("values of evidence.correct", correct)):
        if values is not None and (not isinstance(values, list | tuple) or len(values) != num):
            size = len(values) if isinstance(values, list | tuple) else 1
            raise UserError(
                f"the question {line.id} has {num} responses in its samples and {size} {name} in its scores",
                where=where,
                fix=fix,
            )
    for value in correct or ():
        if value is not None and not isinstance(value, bool):
            raise UserError(
                f"evidence.correct of the question {line.id}: expected true, false or null, found {value!r}",
                where=where,
                fix=fix,
            )
