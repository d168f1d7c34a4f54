"""What every critic is: items in, one judgement per item out; and the words in which it says why it could not judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict

from reward.judgement import Item, Judgement, Verdict
from reward.texts import first_occurrences

__all__ = [
    "DECIMALS",
    "NOTHING_TO_COMPARE",
    "NO_ANSWER",
    "NO_REFERENCE",
    "OUTSIDE_OPTIONS",
    "REFUSED",
    "UNPARSEABLE",
    "BaseCritic",
    "Critic",
    "FileName",
    "Item",
    "Judgement",
    "Verdict",
    "broadcast_to_duplicates",
    "distinct_responses",
    "why_unreadable",
]

DECIMALS = 9

# The path of a file (of a prompt also the name of a built-in one).
FileName = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]

NO_ANSWER = "the critic gave no answer"
REFUSED = "the critic refused"
UNPARSEABLE = "the critic's answer could not be read"
OUTSIDE_OPTIONS = "the critic answers outside the options"
NOTHING_TO_COMPARE = "no other response to compare with"
NO_REFERENCE = "no reference answer"

_REFUSAL = re.compile(
    r"\b(i'?m|i am|we are) (very |so )?sorry\b|\bi (cannot|can't|can not|am unable|'m unable|won't)\b|\bas an ai\b"
    r"|抱歉|对不起|无法(回答|评判|判断|提供)|不能(回答|评判|提供)",
    re.IGNORECASE,
)


class BaseCritic(BaseModel):
    """A critic's fields are its settings, checked when it is made; those that are excluded are what it works with.

    Whole numbers do for numbers; nothing else is converted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement per item, in order."""
        raise NotImplementedError


class Critic(Protocol):
    """Judges the responses of each item; what it could not judge is unscored with a reason, never 0."""

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement per item, in order."""
        ...


def distinct_responses(item: Item) -> list[int]:
    """The indices of the responses that must be judged: of identical ones the first."""
    return sorted(set(first_occurrences(item.responses)))


def broadcast_to_duplicates(
    item: Item, values: Mapping[int, float], unscored: Mapping[int, str]
) -> tuple[list[float | None], dict[int, str]]:
    """Spread what was found for distinct responses over their identical twins.

    Rewards have `DECIMALS`: two that differ by rounding alone are tied, here and wherever they are compared.
    """
    origin = first_occurrences(item.responses)
    rewards = [round(values[index], DECIMALS) if index in values else None for index in origin]
    reasons = {place: unscored[index] for place, index in enumerate(origin) if index not in values}
    return rewards, reasons


def why_unreadable(text: str | None) -> str:
    """The reason why a generated judgement gave nothing: none came, it was a refusal, or it made no sense.

    >>> why_unreadable(None), why_unreadable("I'm sorry, but no."), why_unreadable("blue")
    ('the critic gave no answer', 'the critic refused', "the critic's answer could not be read")
    """
    if text is None or not text.strip():
        return NO_ANSWER
    return REFUSED if _REFUSAL.search(text.replace("’", "'")) else UNPARSEABLE
