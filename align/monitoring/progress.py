"""Progress of a long stage: a bar with rate, time left and memory on a terminal, a plain line now and then elsewhere.

The same numbers stand in the round's folder (`align.monitoring.heartbeat`), for `align status` from another terminal.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from align.distributed.ranks import is_main_process
from align.log import log
from align.monitoring.format import duration, rate
from align.monitoring.heartbeat import Work, current
from align.monitoring.memory import memory_usage

LINE_EVERY_S = 30.0
# advance(step, loss=0.6): `step` more are finished, and numbers to show beside.
Advance = Callable[..., None]


@contextlib.contextmanager
def progress(
    label: str, total: int, done: int = 0, *, weight: int = 1, together: bool = False, parts: str | None = None
) -> Iterator[Advance]:
    """Yield a function that advances the count; `done` were finished before (a resumed stage).

    Only the main process shows anything. With `weight` processes at work on one `total`, each step of its own stands
    for that many; with `together` all processes make the same steps; otherwise `total` is this process's share.
    `parts` is the stem of the files that hold a line for everything that is finished.
    """
    work = Work(label, total, done, "same" if together else "all" if weight > 1 else "own", parts)
    beat = current()
    show = _silent if not is_main_process() else _bar if sys.stderr.isatty() else _lines
    with contextlib.contextmanager(show)(work, weight) as update:

        def advance(step: int = 1, **figures: float) -> None:
            work.advance(step, **figures)
            update()

        if beat is None:
            yield advance
            return
        outer = beat.work, beat.tick
        beat.work, beat.tick = work, update
        try:
            yield advance
            # What an exception has ended stays to be seen.
            beat.work = outer[0]
        finally:
            beat.tick = outer[1]


def describe(work: Work, weight: int = 1) -> str:
    """How far it is, how fast it goes, how long it will take, and the numbers that belong to it.

    >>> work = Work("round 1: dpo", total=40, before=10, own=2, figures={"loss": 0.65432})
    >>> describe(work)  # doctest: +ELLIPSIS
    'round 1: dpo: 12 of 40 (30 %), ... left, loss 0.654'
    """
    done = _done(work, weight)
    parts = [f"{work.label}: {done} of {work.total} ({100 * done // max(work.total, 1)} %)"]
    if not work.own:
        parts.append(f"{duration(time.time() - work.started)} so far")
    elif done < work.total:
        speed = work.speed * weight
        parts += [rate(speed), f"{duration((work.total - done) / max(speed, 1e-9))} left"]
    return ", ".join([*parts, *figure_texts(work.figures)])


def figure_texts(figures: dict[str, float]) -> list[str]:
    """
    >>> figure_texts({"loss": 0.65432, "margin": 0.012})
    ['loss 0.654', 'margin 0.012']
    """
    return [f"{name} {value:.3g}" for name, value in figures.items()]


def _done(work: Work, weight: int) -> int:
    return min(work.before + work.own * weight, work.total)


def _silent(work: Work, weight: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def _bar(work: Work, weight: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    # Where the terminal is narrow the text loses its end.
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    with Progress(BarColumn(bar_width=12), text, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=work.total)

        def update() -> None:
            line = f"{describe(work, weight)}, {memory_usage().short}"
            bar.update(task, completed=_done(work, weight), description=line)

        update()
        yield update
    _say_finished(work, weight)


def _lines(work: Work, weight: int) -> Iterator[Callable[[], None]]:
    spoken = time.monotonic()

    def update() -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken >= LINE_EVERY_S:
            spoken = now
            log.info("%s, memory %s", describe(work, weight), memory_usage().text)

    yield update
    _say_finished(work, weight)


def _say_finished(work: Work, weight: int) -> None:
    """The last line, which stays; not where an exception has ended the work."""
    if work.own:
        seconds = time.time() - work.started
        speed = rate(work.own * weight / max(seconds, 1e-6))
        log.info("%s, %s in %s, memory %s", describe(work, weight), speed, duration(seconds), memory_usage().text)
