"""Text in, a file that is there as a whole or not at all out; folders that can be made,
or a message that says why not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from align.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file at once: a temporary one beside it, renamed when complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_sealed(path: Path, data: dict[str, Any]) -> None:
    """Write a small file of state as JSON with a checksum, for `read_sealed`."""
    write_text(path, json.dumps(data | {"checksum": _checksum(data)}))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where there is no such file or it was damaged since.

    A file without a checksum is taken as it is.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    checksum = data.pop("checksum", None)
    return data if checksum in (None, _checksum(data)) else None


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def make_folder(path: Path) -> None:
    """Make a folder; raises UserError where that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder cannot be made ({error.strerror})",
            where=str(path),
            fix="check the permissions, or set run_root",
        ) from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
