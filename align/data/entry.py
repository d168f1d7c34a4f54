"""What a format's reader makes of one row: a question with its images, and the preferences between answers to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.records import IMAGE_TAG, Turn


class BadRow(ValueError):
    """A row that cannot be used; `reason` is the short form under which it is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True)
class Preference:
    """Two answers, the better one first; `margin` is how much better, where the data say so."""

    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True)
class Entry:
    """One question. `images` are paths, data URIs, bytes, or ``{"bytes": ..., "path": ...}`` as parquet files hold them."""

    question: str
    images: Sequence[Any] = ()
    id: str | None = None
    history: Sequence[Turn] = ()
    answer: str | None = None
    preferences: Sequence[Preference] = ()
    image_root: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def text_in(row: Mapping[str, Any], *names: str) -> str:
    """The text under the first of `names` that the row has; BadRow where there is none or it is empty."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise BadRow(f"{name} is no text", f"found {type(value).__name__}")
        if not value.strip():
            raise BadRow(f"{name} is empty")
        return value
    raise BadRow(f"no {names[0]}", f"the row has {', '.join(map(str, row)) or 'nothing'}")


def images_in(row: Mapping[str, Any], *names: str) -> list[Any]:
    """The images under the first of `names` that the row has, as a list; none is an empty list.

    >>> images_in({"image": "a.png"}, "images", "image"), images_in({"image": ""}, "image")
    (['a.png'], [])
    """
    for name in names:
        if row.get(name) is not None:
            value = row[name]
            return [item for item in (value if isinstance(value, list) else [value]) if item not in (None, "")]
    return []


def turns_of(conversation: Any, name: str = "conversations") -> list[Turn]:
    """A conversation of ``{"from": "human" | "gpt", "value": text}`` as turns, system turns left out."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    if not isinstance(conversation, list) or not conversation:
        raise BadRow(f"{name} is no list of turns")
    turns = []
    for turn in conversation:
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if speaker == "system":
            continue
        if not isinstance(speaker, str) or speaker not in roles or not isinstance(text, str):
            raise BadRow(f"a turn of {name} has no speaker or no text", repr(turn)[:80])
        turns.append(Turn(role=roles[speaker], content=text))
    return turns


def last_question(turns: Sequence[Turn]) -> tuple[list[Turn], str, str | None]:
    """The turns before the last question, that question, and the answer that follows it, if one does."""
    places = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not places:
        raise BadRow("nobody asks anything")
    last = places[-1]
    answer = turns[last + 1].content if last + 1 < len(turns) else None
    return list(turns[:last]), turns[last].content, answer


def without_tags(text: str) -> str:
    """A text without image tags and the white space that they leave behind."""
    return text.replace(IMAGE_TAG, "").strip()
