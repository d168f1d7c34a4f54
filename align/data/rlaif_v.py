"""RLAIF-V and RLHF-V: a question, a chosen and a rejected answer, and the image inside the row.

RLAIF-V (card of openbmb/RLAIF-V-Dataset): parquet with "ds_name", "image" ``{"bytes", "path"}``, "question", "chosen",
"rejected", "origin_dataset", "origin_split", "idx", "image_path". RLHF-V (openbmb/RLHF-V-Dataset) has question, chosen
and rejected as JSON in "text" instead.
"""

from __future__ import annotations

import json

from align.data.entry import BadRow, Entry, Preference
from align.data.fields import Fields


def read_rlaif_v(row: Fields) -> Entry:
    """One pair; the image is taken from the row, or by "image_path" where the row has none."""
    number, source = row.label("id", "idx"), row.label("id", "ds_name")
    images = row.images("image", "image_path")
    if not images:
        raise BadRow("no image")
    texts = _texts(row)
    preference = Preference(texts.text("chosen"), texts.text("rejected"))
    name = None if number is None else f"{source or 'row'}-{number}"
    return Entry(texts.text("question"), images, name, preferences=[preference])


def _texts(row: Fields) -> Fields:
    text = row.take("question, chosen, rejected", "text")
    if text is None:
        return row
    try:
        texts = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise BadRow("text is no valid JSON", error.msg) from None
    if not isinstance(texts, dict):
        raise BadRow("text is no JSON object")
    return Fields(texts)
