"""A data file, a `datasets` folder or the id of a data set in, its rows with their places out."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.data.entry import BadRow
from align.data.json_rows import Row, json_rows, not_utf8
from align.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PARQUET_BATCH = 16
_MISSING = ("nan", "NaN", "<NA>")


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, read as they are asked for.

    Raises:
        UserError: there is no reader for its ending, or it is not what its ending says.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        return json_rows(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _parquet_rows(path)
    raise UserError(
        f"cannot read {suffix or 'a file without ending'}", where=str(path), fix=f"known: {', '.join(SUFFIXES)}"
    )


def saved_rows(path: Path, split: str) -> Iterator[Row]:
    """The rows of a folder that `datasets` saved; `split` where it holds several.

    Raises:
        UserError: there is no such split.
    """
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"no split {split!r}", where=str(path), fix=f"there are: {', '.join(data)}")
        data = data[split]
    return _dataset_rows(data, str(path))


def hub_rows(source: str, split: str, subset: str | None) -> Iterator[Row]:
    """The rows of a data set on the Hugging Face Hub.

    Raises:
        UserError: it cannot be found or reached.
    """
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


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    # A data URI is longer than the 128 KiB that the module allows a field.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
            if twice:
                raise UserError(f"two columns are called {twice[0]!r}", where=str(path), fix="rename one of them")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield Row(where, BadRow("not as many cells as columns"))
                else:
                    # As pandas writes a missing value; the word alone is no text of a question or an answer.
                    yield Row(where, {name: None if cell in _MISSING else cell for name, cell in row.items()})
        except UnicodeDecodeError as error:
            raise not_utf8(path, error.start) from None
        except csv.Error as error:
            raise UserError(f"not a table ({error})", where=f"{path}:{reader.line_num}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_BATCH):
            for data in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", data)
    except (ArrowException, OSError) as error:
        raise UserError(f"not a parquet file, or a damaged one ({error})", where=str(path)) from None


def _dataset_rows(data: Any, where: str) -> Iterator[Row]:
    from datasets import Image

    for name, feature in data.features.items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            data = data.cast_column(name, type(feature)(Image(decode=False)))
    for number, row in enumerate(data, start=1):
        yield Row(f"{where}, row {number}", dict(row))
