"""RLAIF-V, RLHF-V and SPA-VL: a question, a chosen and a rejected answer, and the image inside the row.

RLAIF-V (card of openbmb/RLAIF-V-Dataset): parquet with "ds_name", "image" ``{"bytes", "path"}``, "question", "chosen",
"rejected", "origin_dataset", "origin_split", "idx", "image_path". RLHF-V (openbmb/RLHF-V-Dataset) has question, chosen and
rejected as JSON in "text" instead. SPA-VL (sqrti/SPA-VL): parquet with "image", "question", "chosen", "rejected", "class1",
"class2", "class3"; its test splits have questions only.
"""

from __future__ import annotations

import json
from typing import Any

from align.data.entry import BadRow, Entry, Preference, images_in, text_in


def read_rlaif_v(row: dict[str, Any]) -> Entry:
    """One pair; the image is taken from the row, or by "image_path" where the row has none."""
    name = None if row.get("idx") is None else f"{row.get('ds_name') or 'row'}-{row['idx']}"
    images = images_in(row, "image") or images_in(row, "image_path")
    if not images:
        raise BadRow("no image")
    texts = _texts(row)
    preference = Preference(text_in(texts, "chosen"), text_in(texts, "rejected"))
    return Entry(text_in(texts, "question"), images, name, preferences=[preference])


def _texts(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("text") is None:
        return row
    try:
        texts = json.loads(row["text"]) if isinstance(row["text"], str) else row["text"]
    except json.JSONDecodeError as error:
        raise BadRow("text is no valid JSON", error.msg) from None
    if not isinstance(texts, dict):
        raise BadRow("text is no JSON object")
    return texts


def read_spa_vl(row: dict[str, Any]) -> Entry:
    """One pair (a bare question where the split has no answers), with its classes of harm kept as notes."""
    images = images_in(row, "image")
    if not images:
        raise BadRow("no image")
    preferences = []
    if row.get("chosen") is not None or row.get("rejected") is not None:
        preferences = [Preference(text_in(row, "chosen"), text_in(row, "rejected"))]
    classes = {name: row[name] for name in ("class1", "class2", "class3") if row.get(name)}
    return Entry(text_in(row, "question"), images, preferences=preferences, meta=classes)
