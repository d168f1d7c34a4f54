"""What a person names in, the tables behind it out: a file, a folder, a `datasets` folder or id,
or a file that lists others.

Two listings are known: `meta.json` of MMPR (a name to ``{"root", "annotation", "repeat_time"}``: cards of
OpenGVLab/MMPR, and InternVL's training code, which takes the first `repeat_time` of the rows, or all of them so many
times), and `dataset_info.json` of LLaMA-Factory (a name to ``{"file_name", "formatting", "columns", "tags"}``: its
data/README.md). A listing names files below its own folder or the folder above; what leads out of these is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.data.json_rows import Row
from align.data.messages import Tags
from align.data.rows import SUFFIXES, file_rows, hub_rows, saved_rows
from align.errors import UserError
from align.log import log

# LLaMA-Factory's word for a column: that under which the readers look for it.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"messages": "conversations"}
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Table:
    """Rows of one shape. `name` is what messages call it; `rows` reads them anew.

    `format`, `columns` and `tags` are set where a listing says how the rows are written; `root` is the folder that
    their image paths count from where the listing names one; every row counts `repeat` times.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Tags | None = None
    root: Path | None = None
    repeat: float = 1
    meta: Mapping[str, Any] = field(default_factory=dict)

    def counted_rows(self) -> Iterator[tuple[Row, int]]:
        """The rows with how often each counts: a part of a repetition goes to the first rows, as InternVL has it."""
        whole = math.floor(self.repeat)
        first = 0
        if self.repeat != whole:
            total = sum(1 for _ in self.rows())
            first = int(total * self.repeat) - total * whole
        for number, row in enumerate(self.rows()):
            yield row, whole + (number < first)


def open_source(source: str, *, split: str = "train", subset: str | None = None) -> list[Table]:
    """The tables of a file, of all data files of a folder in order of name, of a listing, of a `datasets` folder or id.

    Raises:
        UserError: there is no such source, or nothing in it that can be read.
    """
    path = Path(source)
    if path.is_file():
        return _listed(path, subset) or [_file(path)]
    if path.is_dir():
        return _folder(path, split, subset)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return [Table(source, lambda: hub_rows(source, split, subset))]
    raise UserError("no such file or folder", where=source, fix="give a file, a folder, or the id of a dataset")


def source_folder(source: str) -> Path:
    """The folder that image paths count from by default."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def _file(path: Path) -> Table:
    if path.suffix.lower() not in SUFFIXES:
        file_rows(path)
    return Table(str(path), lambda: file_rows(path))


def _folder(folder: Path, split: str, subset: str | None) -> list[Table]:
    for name in ("meta.json", "dataset_info.json"):
        if (folder / name).is_file() and (tables := _listed(folder / name, subset)):
            return tables
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [Table(str(folder), lambda: saved_rows(folder, split))]
    return _files(folder)


def _files(folder: Path) -> list[Table]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError("no data files in the folder", where=str(folder), fix=f"known endings: {', '.join(SUFFIXES)}")
    return [_file(file) for file in files]


def _listed(path: Path, subset: str | None) -> list[Table] | None:
    """The tables of a listing; None for a file that is none."""
    if path.suffix.lower() != ".json" or path.stat().st_size > 16_000_000:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not data or not all(isinstance(entry, dict) for entry in data.values()):
        return None
    if all({"root", "annotation"} <= entry.keys() for entry in data.values()):
        return [_mmpr(path, name, entry) for name, entry in _chosen(path, data, subset)]
    places = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
    if all(any(place in entry for place in places) for entry in data.values()):
        return [table for name, entry in _chosen(path, data, subset) for table in _llama_factory(path, name, entry)]
    return None


def _chosen(path: Path, data: dict[str, dict[str, Any]], subset: str | None) -> list[tuple[str, dict[str, Any]]]:
    if subset is None:
        return list(data.items())
    if subset not in data:
        known = ", ".join(list(data)[:20])
        raise UserError(f"it lists no {subset!r}", where=str(path), fix=f"--subset is one of {known}")
    return [(subset, data[subset])]


def _mmpr(path: Path, name: str, entry: dict[str, Any]) -> Table:
    annotation = _inside(path, _text(path, name, entry, "annotation"))
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 <= repeat <= 1000:
        raise UserError(f"repeat_time of {name!r} is a number from 0 to 1000, found {repeat!r}", where=str(path))
    return Table(
        str(annotation),
        lambda: file_rows(annotation),
        format="mmpr",
        root=_inside(path, _text(path, name, entry, "root")),
        repeat=repeat,
        meta={"source": name},
    )


def _llama_factory(path: Path, name: str, entry: dict[str, Any]) -> list[Table]:
    if not isinstance(entry.get("file_name"), str):
        raise UserError(
            f"{name!r} is not a file beside it", where=str(path), fix="name one that is with --subset, or download it"
        )
    place = _inside(path, entry["file_name"])
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"formatting of {name!r} is alpaca, sharegpt or openai, found {formatting!r}", where=str(path))
    if entry.get("num_samples") is not None:
        log.warning("%s: num_samples of %r is not used: all rows are read, --limit draws so many", path, name)
    words = _ALPACA if formatting == "alpaca" else _SHAREGPT
    columns = {words.get(key, key): column for key, column in _object(path, name, entry, "columns").items()}
    return [
        replace(
            table,
            format="alpaca" if formatting == "alpaca" else "llama-factory",
            columns={key: column for key, column in columns.items() if isinstance(column, str)},
            tags=_tags(_object(path, name, entry, "tags"), formatting),
        )
        for table in (_files(place) if place.is_dir() else [_file(place)])
    ]


def _tags(given: dict[str, Any], formatting: str) -> Tags | None:
    if not given:
        return None
    openai = formatting == "openai"
    speakers = {"user": "user", "assistant": "assistant", "system": "system"} if openai else _SPEAKERS
    return Tags(
        str(given.get("role_tag", "role" if openai else "from")),
        str(given.get("content_tag", "content" if openai else "value")),
        {str(given.get(f"{role}_tag", speaker)): role for role, speaker in speakers.items()},
    )


def _object(path: Path, name: str, entry: dict[str, Any], key: str) -> dict[str, Any]:
    found = entry.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{key} of {name!r} is an object, found {type(found).__name__}", where=str(path))
    return found


def _text(path: Path, name: str, entry: dict[str, Any], key: str) -> str:
    if not isinstance(entry[key], str):
        raise UserError(f"{key} of {name!r} is a path, found {type(entry[key]).__name__}", where=str(path))
    return entry[key]


def _inside(listing: Path, reference: str) -> Path:
    """What a listing names, from its folder or the one above (the published paths of MMPR begin with `MMPR/`)."""
    folder = listing.parent.resolve()
    for base in (listing.parent, folder.parent):
        try:
            found = base / reference
            if found.exists():
                break
        except (OSError, ValueError):
            continue
    else:
        raise UserError(
            f"{listing.name} names {reference!r}, which is not there",
            where=str(listing.parent),
            fix="unpack what it names beside it, or correct the path in it",
        )
    if not found.resolve().is_relative_to(folder.parent):
        raise UserError(f"{listing.name} names {reference!r}, which lies outside", where=str(listing.parent))
    return found
