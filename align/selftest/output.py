"""What a check prints, and what the processes print that it starts, kept in a file: the screen has a line per check."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

# Of what a check printed that has failed.
SHOWN_CHARACTERS = 4000


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Within the context standard output and standard error, of other processes too, go to the end of a file."""
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        with path.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
            for descriptor in saved:
                os.dup2(file.fileno(), descriptor)
            yield
    finally:
        for descriptor, before in saved.items():
            os.dup2(before, descriptor)
            os.close(before)


def end_of(path: Path, start: int) -> str:
    """The last of what a file has from byte `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")[-SHOWN_CHARACTERS:]
