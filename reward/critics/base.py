"""What every critic is: items in, one judgement an item out; and the words in which it says why it could not judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

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
    "Critic",
    "Item",
    "Judgement",
    "Verdict",
    "broadcast_to_duplicates",
    "distinct_responses",
    "why_unreadable",
]

DECIMALS = 9

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


class Critic(Protocol):
    """Judges the responses of each item; what it could not judge is unscored with a reason, never 0."""

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement an item, in order."""
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
