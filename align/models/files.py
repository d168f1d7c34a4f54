"""JSON files of a checkpoint, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import UserError

AGAIN = "restore it from a copy, or download or save it again"


def inside(folder: Path, name: str) -> Path:
    """The file of this name in a checkpoint folder.

    A link may lead elsewhere in the folder, or to the blobs of the Hub's cache, where a folder of snapshots is all
    links. Raises UserError where the name or a link leads out of it:
    a foreign checkpoint must not name files of this machine.
    """
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name!r} is not the name of a file ({error})", where=str(folder)) from None
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not real.is_relative_to(root) and not real.is_relative_to(blobs):
        raise UserError(
            f"expected files inside the folder, found {name!r}, which leads to {real}",
            where=str(folder),
            fix="copy the file into the folder, or remove the link",
        )
    return path


def files_inside(folder: Path) -> list[Path]:
    """All files in a folder and below it. Raises UserError as `inside` does."""
    return [inside(folder, str(path.relative_to(folder))) for path in sorted(folder.rglob("*"))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file and the place of the fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"expected a JSON object ({error})", where=str(path), fix=AGAIN) from None
    if not isinstance(content, dict):
        raise UserError(f"expected a JSON object, found {type(content).__name__}", where=str(path), fix=AGAIN)
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file of two-space indents."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
