"""A JSON Lines file in, checked records with the place of each out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from reward.errors import RewardError

RecordT = TypeVar("RecordT", bound=BaseModel)


def read_lines(path: Path, kind: type[RecordT]) -> Iterator[tuple[str, RecordT]]:
    """Every record with `file:line`; blank lines are skipped.

    Raises:
        RewardError: there is no such file, or a line is not such a record (with its place).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, kind.model_validate(json.loads(line))
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
            raise RewardError(f"{where}: not a valid {kind.__name__}: {faults}") from None
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{where}: not valid JSON ({error})") from None
