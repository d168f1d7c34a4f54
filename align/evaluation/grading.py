"""An engine's answer to a held-out question in; records of its responses with what is known of each out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.errors import reward_faults
from align.records import Evaluated, Question
from align.statistics import words
from reward.critics.verifier import grade

if TYPE_CHECKING:
    from align.engines.base import SampleResult


def evaluated(result: SampleResult, question: Question, *, keep_tokens: Sequence[bool] = ()) -> list[Evaluated]:
    """The responses, held against the question's answer and absent objects; with the tokens of those that
    `keep_tokens` names, where they are known."""
    kept = [*keep_tokens, *[False] * (len(result.texts) - len(keep_tokens))]
    known = result.token_ids or [()] * len(result.texts)
    token_ids = [ids if keep else () for ids, keep in zip(known, kept, strict=True)]
    return [
        Evaluated(
            text=text,
            num_tokens=num_tokens,
            finish_reason=reason,
            correct=_correct(text, question),
            absent_named=[word for word in question.absent_objects if word in set(words(text))],
            token_ids=list(ids),
        )
        for text, num_tokens, reason, ids in zip(
            result.texts, result.num_tokens, result.finish_reasons, token_ids, strict=True
        )
    ]


def is_right(response: Evaluated) -> float:
    """1 for a response that agrees with the reference answer."""
    return float(bool(response.correct))


def hallucinates(response: Evaluated) -> float:
    """1 for a response that names something absent."""
    return float(bool(response.absent_named))


def _correct(text: str, question: Question) -> bool | None:
    if question.answer is None:
        return None
    with reward_faults():
        found = grade(text, question.answer, question=question.question, kind=question.answer_kind)
    return None if found is None else found.correct
