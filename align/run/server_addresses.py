"""Servers that a stage has started in, a file in the round's folder out that says where they answer while they run.

    runs/NAME/round-N/servers/STAGE.json      one per process that has started servers

It is for people and for `align status`: nothing depends on it. A process that was killed leaves its file behind; the
next start of the stage writes over it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from align.files import make_folder, read_sealed, write_sealed


@dataclass(frozen=True)
class ServerAddresses:
    """Where servers answer, as their own machine `host` calls itself; `since` is in seconds since 1970."""

    host: str
    pid: int
    since: float
    model: str
    urls: list[str]

    @property
    def text(self) -> str:
        """What a person reads."""
        return f"{self.model} on {self.host}: {', '.join(self.urls)}"


def publish(path: Path, model: str, urls: Sequence[str]) -> None:
    """Write where this process's servers answer; `path` ends with .json."""
    make_folder(path.parent)
    write_sealed(path, asdict(ServerAddresses(socket.gethostname(), os.getpid(), time.time(), model, list(urls))))


def withdraw(path: Path) -> None:
    """Remove what `publish` wrote, where it did."""
    path.unlink(missing_ok=True)


def published(folder: Path) -> list[ServerAddresses]:
    """What the files of a folder say, in the order of their names; a damaged one is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = read_sealed(path)
        if data is not None and data.keys() == ServerAddresses.__dataclass_fields__.keys():
            found.append(ServerAddresses(**data))
    return found
