"""hub.json of a run: which rounds are on the Hub, under which checkpoint, and which pushes failed."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ValidationError

from align.errors import UserError
from align.files import write_text
from align.run.folder import RunDir


class FailedPush(BaseModel):
    """A push that did not end well, and why."""

    round: int
    error: str
    when: str


class Pushes(BaseModel):
    """By round what is on the Hub (`checkpoint`: its hash, `url`, `when`), and every push that failed."""

    pushed: dict[int, dict[str, str]] = {}
    failed: list[FailedPush] = []

    def open_failures(self) -> dict[int, list[FailedPush]]:
        """By round the failed pushes of those that are not on the Hub yet."""
        rounds = sorted({failure.round for failure in self.failed} - self.pushed.keys())
        return {number: [one for one in self.failed if one.round == number] for number in rounds}

    def write(self, path: Path) -> None:
        """Write the file at once."""
        write_text(path, json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n")


def pushes_path(run: RunDir) -> Path:
    """Where a run keeps them."""
    return run.path / "hub.json"


def read_pushes(run: RunDir) -> Pushes:
    """What is known of a run's pushes; nothing where none was tried.

    Raises:
        UserError: the file is damaged.
    """
    path = pushes_path(run)
    if not path.is_file():
        return Pushes()
    try:
        return Pushes.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        said = str(error).splitlines()[0]
        fix = "remove the file: the rounds are pushed again"
        raise UserError(f"the record of pushes is damaged ({said})", where=str(path), fix=fix) from None
