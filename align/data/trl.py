"""TRL's preference format, and this toolkit's pairs.jsonl, which is that with an id and where the pair came from.

"prompt", "chosen" and "rejected" are texts or lists of messages; without "prompt" it is what "chosen" and "rejected"
have in common (implicit prompt). Images stand in "images" or in the parts of the prompt: "Dataset formats and types" of
TRL's documentation. Beside "prompt", "chosen" and "rejected" may repeat the whole dialogue,
as in ultrafeedback_binarized.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from align.data.dialogues import entry_of
from align.data.entry import BadRow, Entry, Preference
from align.data.fields import Fields, unpacked
from align.data.messages import Dialogue, Message, dialogue_of, messages_of, response_of


def read_trl(row: Fields) -> Entry:
    """One pair with all that our own pairs hold besides; a bare question where there are no responses."""
    sides: dict[str, tuple[list[Message], str]] = {}
    for role in ("chosen", "rejected"):
        value = row.take(role)
        if value is not None:
            sides[role] = response_of(value, role)
    if len(sides) == 1:
        raise BadRow(f"no {'rejected' if 'chosen' in sides else 'chosen'}")
    prompt = row.take("history, question", "prompt")
    messages = messages_of(prompt, "prompt") if prompt is not None else None
    dialogues = [dialogue_of(before) for before, _ in sides.values() if before]
    dialogue = dialogue_of(messages) if messages is not None else dialogues[0] if dialogues else None
    if dialogue is None:
        raise BadRow("no prompt", f"the row has {', '.join(row)}")
    if any(_asked(other) != _asked(dialogue) for other in dialogues):
        raise BadRow("prompt, chosen and rejected ask different things")
    if dialogue.answer is not None:
        raise BadRow("the prompt ends with an answer")
    preferences = []
    if sides:
        (_, chosen), (_, rejected) = sides["chosen"], sides["rejected"]
        margin, rewards, responses = _number(row, "margin"), _numbers(row, "rewards"), _numbers(row, "responses")
        indices = {name: int(index) for name, index in responses.items()}
        preferences = [Preference(chosen, rejected, margin, rewards, indices)]
    entry = entry_of(row, dialogue, preferences)
    return replace(entry, question_id=row.label("question_id"), meta=row.object("meta"))


def _asked(dialogue: Dialogue) -> tuple[Any, ...]:
    return dialogue.question, dialogue.history


def _number(row: Fields, name: str) -> float | None:
    """A number under a name; a column that holds something else under it is another's, and stays unused."""
    value = row.get(name)
    return row.take(name) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(row: Fields, name: str) -> dict[str, float]:
    value = unpacked(row.get(name))
    known = {"chosen", "rejected"}
    if not isinstance(value, dict) or not value.keys() <= known:
        return {}
    numbers = {side: number for side, number in value.items() if isinstance(number, (int, float))}
    if numbers:
        row.take(name)
    return numbers
