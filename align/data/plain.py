"""Plain tables, and this toolkit's questions.jsonl: a question with its images, and perhaps an answer or two responses.

The columns may be called as in COLUMNS (whatever the case), or are named with `--columns
question=prompt,images=picture`. Where none is called like an image, the columns whose values look like images are
taken. MMPR, MM-RLHF and SPA-VL are plain
tables too: cards of OpenGVLab/MMPR (v1.2 adds "answer_gt"), yifanzhang114/MM-RLHF and sqrti/SPA-VL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from align.data.entry import BadRow, Entry, Preference
from align.data.fields import Fields, unpacked
from align.data.messages import history_of

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "uid", "idx", "index"),
    "question": ("question", "prompt", "query", "instruction", "problem"),
    "images": (
        *("images", "image", "image_path", "img_path", "image_paths", "image_file", "img", "picture", "file_name"),
        *("image_url", "image_urls", "img_url", "image_src", "img_src"),
    ),
    "video": ("video", "videos", "video_path"),
    "answer": ("answer", "answer_gt", "ground_truth", "solution"),
    "answer_kind": ("answer_kind",),
    "absent_objects": ("absent_objects",),
    "system": ("system",),
    "history": ("history",),
    "meta": ("meta",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
CLASSES = ("class1", "class2", "class3")
IMAGE_SUFFIX = re.compile(r"\.(?:jpe?g|png|webp|bmp|gif|tiff?|avif|jfif)(?:\?.*)?$", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:image|img)_?(\d+)", re.IGNORECASE)


def read_plain(row: Fields) -> Entry:
    """Everything that a question can hold, and the preference between `chosen` and `rejected` where the row has one."""
    preferences = []
    if row.has("chosen") or row.has("rejected"):
        preferences = [Preference(row.text("chosen"), row.text("rejected"))]
    return Entry(
        row.text("question", *COLUMNS["question"]),
        _images(row),
        row.label("id", *COLUMNS["id"]),
        history_of(row.take("history")),
        system=row.optional_text("system"),
        video=row.video(*COLUMNS["video"]),
        answer=row.label("answer", *COLUMNS["answer"]),
        answer_kind=row.optional_text("answer_kind"),
        absent_objects=_absent(row),
        preferences=preferences,
        meta=row.object("meta"),
    )


def read_spa_vl(row: Fields) -> Entry:
    """One pair (a bare question where the split has no answers), with its classes of harm kept in `meta`."""
    entry = read_plain(row)
    if not entry.images:
        raise BadRow("no image")
    return replace(entry, meta={name: row.take("meta", name) for name in CLASSES if row.has(name)})


def looks_like_image(value: Any) -> bool:
    """Whether a value is what data sets write for an image: a path, URL or data URI of one, bytes, a struct,
    a list of them.

    >>> [looks_like_image(value) for value in ("a/b.JPG", "https://x.org/a.png?", {"bytes": b"", "path": None}, "a.b")]
    [True, True, True, False]
    """
    value = unpacked(value)
    if isinstance(value, list):
        return bool(value) and all(looks_like_image(item) for item in value)
    if isinstance(value, dict):
        return {"bytes", "path"} <= value.keys()
    if isinstance(value, str):
        return value.startswith("data:image/") or (len(value) < 2048 and IMAGE_SUFFIX.search(value) is not None)
    return isinstance(value, bytes)


def _images(row: Fields) -> list[Any]:
    found = row.images(*COLUMNS["images"])
    return found or [image for name in _image_columns(row) for image in row.images(name)]


def _image_columns(row: Fields) -> Iterator[str]:
    """Columns called image_1, image_2, ... in their order; where there are none, the first that looks like images."""
    numbered = sorted((int(found[1]), name) for name in row if (found := _NUMBERED.fullmatch(name)) and row.has(name))
    if numbered:
        yield from (name for _, name in numbered)
        return
    named = {name for role, names in COLUMNS.items() if role != "images" for name in names}
    yield from [name for name in row if name not in named and looks_like_image(row.get(name))][:1]


def _absent(row: Fields) -> list[str]:
    words = unpacked(row.take("absent_objects"))
    if words is None:
        return []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise BadRow("absent_objects is no list of words", repr(words)[:80])
    return words
