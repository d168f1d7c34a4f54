"""LLaVA and LLaVA-RLHF conversation files: the last question of each dialogue, with the earlier turns as its history.

A JSON array of ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}`` as in
liuhaotian/LLaVA-Instruct-150K. The preferences of zhiqings/LLaVA-Human-Preference-10K (`llava_7b_v1_preference.json`)
have besides ``"output_1": {"value"}, "output_2": {"value"}, "preference": 1 | 2``, and their dialogue ends with a question.
"""

from __future__ import annotations

from typing import Any

from align.data.entry import BadRow, Entry, Preference, images_in, last_question, turns_of


def read_llava(row: dict[str, Any]) -> Entry:
    """The last question of a dialogue; what was answered to it in the file is not a reference answer and is left out."""
    history, question, _ = last_question(turns_of(row.get("conversations")))
    return Entry(question, images_in(row, "image", "images"), _id(row), history)


def read_llava_preference(row: dict[str, Any]) -> Entry:
    """The question with the human's preference between the two outputs."""
    entry = read_llava(row)
    outputs = [row.get(name) for name in ("output_1", "output_2")]
    texts = [output.get("value") if isinstance(output, dict) else None for output in outputs]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow("output_1 or output_2 has no text")
    preferred = row.get("preference")
    if preferred not in (1, 2):
        raise BadRow("preference is neither 1 nor 2", repr(preferred))
    chosen, rejected = texts if preferred == 1 else texts[::-1]
    return Entry(entry.question, entry.images, entry.id, entry.history, preferences=[Preference(chosen, rejected)])  # type: ignore[arg-type]


def _id(row: dict[str, Any]) -> str | None:
    return None if row.get("id") is None else str(row["id"])
