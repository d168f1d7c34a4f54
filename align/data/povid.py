"""POVID: LLaVA conversations beside the same ones with a hallucinated answer.

A JSON array of ``{"id", "image", "conversations", "rejected_conversations"}``: card of
YiyangAiLab/POVID_preference_data_for_VLLMs, and the loader of the authors' training code (YiyangZhou/POVID,
llava/train/train_dpo.py).
"""

from __future__ import annotations

from typing import Any

from align.data.entry import BadRow, Entry, Preference, images_in, last_question, turns_of


def read_povid(row: dict[str, Any]) -> Entry:
    """The last question, with its answers in both conversations."""
    history, question, chosen = last_question(turns_of(row.get("conversations")))
    _, other, rejected = last_question(turns_of(row.get("rejected_conversations"), "rejected_conversations"))
    if question != other:
        raise BadRow("the two conversations ask different things")
    if chosen is None or rejected is None:
        raise BadRow("a conversation ends without an answer")
    name = None if row.get("id") is None else str(row["id"])
    return Entry(question, images_in(row, "image"), name, history, preferences=[Preference(chosen, rejected)])
