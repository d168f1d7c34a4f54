"""A source in, its rows with their places out: JSON, JSONL, CSV, TSV and parquet files, folders of them, `datasets`.

A row that is not even readable comes out as the error that says so, so that the rest goes on.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.entry import BadRow
from align.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Row:
    """A row and where it stands (`file:line`); `data` is a BadRow where it could not be read."""

    where: str
    data: dict[str, Any] | BadRow


def read_rows(source: str, *, split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """The rows of a file, of all data files of a folder in order of name, of a `datasets` folder or of a `datasets` id.

    Raises:
        UserError: there is no such source, or nothing in it that can be read.
    """
    path = Path(source)
    if path.is_file():
        return _file_rows(path)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved_rows(path, split)
        return _folder_rows(path)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _hub_rows(source, split, subset)
    raise UserError("no such file or folder", where=source, fix="give a file, a folder, or the id of a dataset")


def source_folder(source: str) -> Path:
    """The folder that image paths count from unless told otherwise."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def _folder_rows(folder: Path) -> Iterator[Row]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError("no data files in the folder", where=str(folder), fix=f"known endings: {', '.join(SUFFIXES)}")
    return (row for file in files for row in _file_rows(file))


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if suffix == ".json":
        return _json_array(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _parquet_rows(path)
    raise UserError(
        f"cannot read {suffix or 'a file without ending'}", where=str(path), fix=f"known: {', '.join(SUFFIXES)}"
    )


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{path}:{number}", _parsed(line))


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8 text", f"byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow("no valid JSON", f"{error.msg} at column {error.colno}")
    return data if isinstance(data, dict) else BadRow("no JSON object", type(data).__name__)


def _json_array(path: Path) -> Iterator[Row]:
    """Entries of an array; what is called .json and is JSON lines is read as that."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except json.JSONDecodeError as error:
        with path.open("rb") as file:
            looks_like_lines = isinstance(_parsed(file.readline()), dict)
        if looks_like_lines:
            yield from _json_lines(path)
            return
        raise UserError(f"not valid JSON ({error.msg} at line {error.lineno})", where=str(path)) from None
    for number, entry in enumerate(data if isinstance(data, list) else [data], start=1):
        yield Row(f"{path}, entry {number}", entry if isinstance(entry, dict) else BadRow("no JSON object"))


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    # A data URI is longer than the 128 KiB that the module allows a field.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield Row(where, BadRow("not as many cells as columns"))
                else:
                    yield Row(where, dict(row))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"not UTF-8 text (byte {error.start})", where=str(path), fix="save it as UTF-8")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowInvalid

    try:
        file = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"not a parquet file ({error})", where=str(path)) from None
    number = 0
    for batch in file.iter_batches(batch_size=64):
        for data in batch.to_pylist():
            number += 1
            yield Row(f"{path}, row {number}", data)


def _saved_rows(path: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"no split {split!r}", where=str(path), fix=f"there are: {', '.join(data)}")
        data = data[split]
    return _dataset_rows(data, str(path))


def _hub_rows(source: str, split: str, subset: str | None) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        data = load_dataset(source, subset, split=split)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"neither a file or folder here nor a dataset that can be reached ({error})",
            where=source,
            fix="check the name, or download the files and name their folder",
        ) from None
    return _dataset_rows(data, source)


def _dataset_rows(data: Any, where: str) -> Iterator[Row]:
    from datasets import Image

    for name, feature in data.features.items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            data = data.cast_column(name, type(feature)(Image(decode=False)))
    for number, row in enumerate(data, start=1):
        yield Row(f"{where}, row {number}", dict(row))
