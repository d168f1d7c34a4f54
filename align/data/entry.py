"""What a format's reader makes of one row: a question with its images, and the preferences between responses to it."""

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
    """Two responses, the better one first.

    `margin` is how much better, where the data say so; `rewards` and `responses` are those of a pair of our own.
    """

    chosen: str
    rejected: str
    margin: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    responses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One question, field by field as in `align.records.Question`, with the preferences between responses to it.

    `images` are paths, URLs, data URIs, bytes, or ``{"bytes": ..., "path": ...}`` as parquet files hold them; `id` is
    the row's own, `question_id` that of the question where a pair names it.
    """

    question: str
    images: Sequence[Any] = ()
    id: str | None = None
    history: Sequence[Turn] = ()
    system: str | None = None
    video: str | None = None
    answer: str | None = None
    answer_kind: str | None = None
    absent_objects: Sequence[str] = ()
    preferences: Sequence[Preference] = ()
    question_id: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def without_tags(text: str) -> str:
    """A text without image tags and the white space that they leave behind."""
    return text.replace(IMAGE_TAG, "").strip()
