"""Text in, a file that is there as a whole or not at all out; folders that can be made,
or a message that says why not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

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
