"""How long a test waits for another process: so long that only a hung one fails it, never a busy machine."""

import time
from collections.abc import Callable

PATIENCE_S = 1800


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until something is true; AssertionError where it does not become so."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "still not true"
        time.sleep(0.02)
