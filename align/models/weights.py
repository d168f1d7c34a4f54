"""A checkpoint folder in, the names and sizes of its tensors out, read from the safetensors headers alone.

This is how a cut download is found before gigabytes are loaded, and how a saved checkpoint is held against its parent.
Tensor data are not read. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from align.errors import UserError
from align.models.files import AGAIN

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its type as safetensors names it (`BF16`), its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises UserError where the file is cut or no safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or header_bytes > size - LENGTH_BYTES:
            raise UserError(
                "expected a whole safetensors file, found a cut or foreign one", where=str(path), fix=_AGAIN
            )
        try:
            header = json.loads(file.read(header_bytes))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            tensors = {name: _tensor_info(entry) for name, entry in entries.items()}
            data_bytes = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                "expected a safetensors header, found something else", where=str(path), fix=_AGAIN
            ) from None
    expected = LENGTH_BYTES + header_bytes + data_bytes
    if size != expected:
        raise UserError(f"expected {expected:,} bytes, found {size:,}", where=str(path), fix=_AGAIN)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, those that transformers loads; empty where it has none.

    Raises UserError for a missing shard.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not index.is_file():
        return []
    shards = shards_of(index)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"expected {len(shards)} weight files, {len(missing)} are missing: {', '.join(missing[:4])}",
            where=str(index),
            fix="download the folder again",
        )
    return shards


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, all beside it.

    Raises UserError for one that is elsewhere: it would be read, and be part of no hash of the folder.
    """
    names = set(_weight_map(index).values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not Path(name).suffix:
            raise UserError(
                f"expected names of files beside the index, found {name!r}", where=str(index), fix="move the file there"
            )
    return [index.parent / name for name in sorted(names)]


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint. Raises UserError for cut files,
    missing shards and tensors that are in none of them."""
    table = {name: info for path in weight_files(folder) for name, info in read_header(path).items()}
    index = folder / INDEX_FILE
    if index.is_file() and not (folder / SINGLE_FILE).is_file():
        missing = sorted(set(_weight_map(index)) - set(table))
        if missing:
            raise UserError(
                f"the index names {len(missing)} tensors that no file holds, such as {missing[0]}",
                where=str(index),
                fix="download the folder again",
            )
    return table


def has_pickle(folder: Path) -> bool:
    """Whether weights in the folder are pickled."""
    return any((folder / name).is_file() for name in PICKLE_FILES)


_AGAIN = f"the file is damaged: {AGAIN}"


def _tensor_info(entry: dict) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), end - start)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected an index of weight files ({error})", where=str(index), fix=_AGAIN) from None
