"""Plain tables: a question, its images as paths, bytes or data URIs, and perhaps an answer or a chosen and a rejected one.

The columns may be called as in COLUMNS, or are named with `--columns question=prompt,images=picture`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from align.data.entry import BadRow, Entry, Preference, images_in, text_in
from align.errors import UserError

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "uid"),
    "question": ("question", "prompt", "query", "instruction"),
    "images": ("images", "image", "image_path", "img_path"),
    "answer": ("answer", "answer_gt", "ground_truth"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}


def plain_reader(columns: Mapping[str, str]) -> Callable[[dict[str, Any]], Entry]:
    """A reader for these column names; what is not named is looked for under the usual names.

    Raises:
        UserError: a column is named for something that there is not.
    """
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise UserError(f"no column is for {unknown[0]!r}", fix=f"columns are for: {', '.join(COLUMNS)}")
    names = {key: (columns[key],) if key in columns else usual for key, usual in COLUMNS.items()}

    def read(row: dict[str, Any]) -> Entry:
        missing = [column for column in columns.values() if column not in row]
        if missing:
            raise BadRow(f"no column {missing[0]}", f"the row has {', '.join(map(str, row))}")
        preferences = []
        if any(row.get(name) for key in ("chosen", "rejected") for name in names[key]):
            preferences = [Preference(text_in(row, *names["chosen"]), text_in(row, *names["rejected"]))]
        return Entry(
            text_in(row, *names["question"]),
            _images(row, names["images"]),
            _text(row, names["id"]),
            answer=_text(row, names["answer"]),
            preferences=preferences,
        )

    return read


def _text(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    return None if found is None else str(found)


def _images(row: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    """A list, one image, or (in a CSV cell) a JSON list of images."""
    images = images_in(row, *names)
    if len(images) == 1 and isinstance(images[0], str) and images[0].lstrip().startswith("["):
        try:
            listed = json.loads(images[0])
        except json.JSONDecodeError:
            return images
        return listed if isinstance(listed, list) else images
    return images
