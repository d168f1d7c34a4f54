"""Progress of a long stage: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from align.ranks import is_main_process

log = logging.getLogger("align")

LINE_EVERY_S = 30.0


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0, weight: int = 1) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the count; `done` were finished before (a resumed stage).

    Only the main process shows anything; with `weight` processes at work, each step of its own stands for that many.
    """
    if not is_main_process():
        yield lambda step: None
        return
    show = _bar if sys.stderr.isatty() else _lines
    with contextlib.contextmanager(show)(label, total, done) as advance:
        yield lambda step: advance(step * weight)


def _bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, rate="")
        started, count = time.monotonic(), 0

        def advance(step: int) -> None:
            nonlocal count
            count += step
            rate = count / max(time.monotonic() - started, 1e-6)
            bar.update(task, advance=step, rate=f"{rate:.1f}/s")

        yield advance


def _lines(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    started = spoken = time.monotonic()
    count = 0

    def advance(step: int) -> None:
        nonlocal count, spoken
        count += step
        now = time.monotonic()
        if now - spoken >= LINE_EVERY_S:
            spoken = now
            rate = count / (now - started)
            left = (total - done - count) / max(rate, 1e-9)
            log.info("%s: %d of %d, %.1f/s, %d s left", label, done + count, total, rate, left)

    yield advance
