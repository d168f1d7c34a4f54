"""What holds for every test."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Take what has been imported out of the garbage collector's sight: trainers and engines collect between models, and
    to go through every module of every library takes half a second each time."""
    gc.collect()
    gc.freeze()
