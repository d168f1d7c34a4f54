"""JSON files of a checkpoint, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file and the place of the fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"expected a JSON object ({error})", where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError(f"expected a JSON object, found {type(content).__name__}", where=str(path))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
