"""MMPR: pairs in JSON lines, one file a source, listed with their image folders in a `meta.json`.

Lines of ``{"image", "question", "chosen", "rejected"}`` (v1.2 adds "answer_gt"), where "image" is a path inside the
source's "root", a list of them, or absent; `meta.json` maps a name to ``{"root", "annotation", ...}``: cards of
OpenGVLab/MMPR, MMPR-v1.1 and MMPR-v1.2, and the preference chapter of InternVL's manual.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.data.entry import BadRow, Entry, Preference, images_in, text_in
from align.data.rows import Row, read_rows
from align.errors import UserError


def read_mmpr(row: dict[str, Any]) -> Entry:
    """One pair; `image_root` is set where the row came through a `meta.json`."""
    answer = row.get("answer_gt")
    return Entry(
        text_in(row, "question"),
        images_in(row, "image"),
        None if row.get("id") is None else str(row["id"]),
        answer=answer if isinstance(answer, str) and answer.strip() else None,
        preferences=[Preference(text_in(row, "chosen"), text_in(row, "rejected"))],
        image_root=row.get("_root"),
        meta={"source": row["_source"]} if "_source" in row else {},
    )


def mmpr_rows(source: str, **options: Any) -> Iterator[Row]:
    """Rows of every annotation file that a `meta.json` names; of anything else, its own rows.

    Paths in the meta file count from the folder in which it lies; where they lead nowhere, from the folder above it
    (the published paths begin with `MMPR/`).
    """
    path = Path(source)
    meta = path / "meta.json" if path.is_dir() else path
    listed = _listed(meta) if meta.is_file() and meta.suffix == ".json" else None
    if listed is None:
        yield from read_rows(source, **options)
        return
    for name, entry in listed.items():
        annotation = _inside(meta.parent, entry["annotation"])
        root = _inside(meta.parent, entry["root"])
        for row in read_rows(str(annotation)):
            yield (
                row
                if isinstance(row.data, BadRow)
                else replace(row, data=row.data | {"_root": str(root), "_source": name})
            )


def _listed(meta: Path) -> dict[str, dict[str, Any]] | None:
    try:
        data = json.loads(meta.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    is_meta = (
        isinstance(data, dict)
        and data
        and all(isinstance(e, dict) and {"root", "annotation"} <= e.keys() for e in data.values())
    )
    return data if is_meta else None


def _inside(folder: Path, reference: str) -> Path:
    for base in (folder, folder.parent):
        if (base / reference).exists():
            return base / reference
    raise UserError(
        f"meta.json names {reference!r}, which is not there",
        where=str(folder),
        fix="unpack the annotations and images beside meta.json, or correct the path in it",
    )
