"""What a process is doing, written every two seconds to its round's folder, where `align status` reads it.

    runs/NAME/round-N/.progress-RANK.json      one file a process; gone when the stage is complete

A file that is not written any more belongs to a process that has died. It is for looking at: nothing depends on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from align.distributed.ranks import is_main_process, rank
from align.files import write_sealed
from align.monitoring.memory import memory_usage

HEARTBEAT_S = 2.0
# Steps that the speed is taken from: old enough ones, such as those before the model was loaded, count no more.
MARKS = 256
Scope = Literal["all", "own", "same"]


@dataclass
class Work:
    """How far a process has come with one thing.

    `before` was finished by an earlier start, `own` by this process in this one; `moved` is the time of the last step.
    `scope` says what `total` counts: the things of all processes together, its own share, or steps that all processes
    make together. `parts` names the files that hold a line for each finished thing, where there are such.
    """

    label: str
    total: int
    before: int = 0
    scope: Scope = "own"
    parts: str | None = None
    own: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    moved: float | None = None
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=MARKS), repr=False)

    def __post_init__(self) -> None:
        self._marks.append((time.monotonic(), 0))

    def advance(self, step: int, **figures: float) -> None:
        """Count finished steps, with figures to show beside them."""
        self.figures |= figures
        if step:
            self.own += step
            self.moved = time.time()
            self._marks.append((time.monotonic(), self.own))

    @property
    def speed(self) -> float:
        """Things of this process per second, over the last steps."""
        since, count = self._marks[0]
        return (self.own - count) / max(time.monotonic() - since, 1e-6)

    def as_dict(self) -> dict[str, object]:
        """As the heartbeat file holds it."""
        public = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return public | {"speed": self.speed}


@dataclass
class Heartbeat:
    """One process at work on one stage."""

    folder: Path
    stage: str
    work: Work | None = None
    # Called every two seconds by the thread that writes; for lines in a log.
    tick: Callable[[], None] | None = None
    started: float = field(default_factory=time.time)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> Path:
        """The process's file."""
        return self.folder / f".progress-{rank()}.json"

    def write(self) -> None:
        """Write the file at once."""
        data = {
            "stage": self.stage,
            "started": self.started,
            "alive": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "memory": asdict(memory_usage()),
            "work": None if self.work is None else self.work.as_dict(),
        }
        # A full disk shows where something is written that counts.
        with contextlib.suppress(OSError):
            write_sealed(self.path, data)

    def keep_writing(self) -> None:
        """Write until the stage ends: the work of a thread."""
        while not self._ended.wait(HEARTBEAT_S):
            self.write()
            if self.tick is not None:
                self.tick()

    def end(self) -> None:
        """Let the writing thread end."""
        self._ended.set()


_current: Heartbeat | None = None


def current() -> Heartbeat | None:
    """What this process is doing, where it is at a stage."""
    return _current


@contextlib.contextmanager
def heartbeat(folder: Path, stage: str) -> Iterator[None]:
    """Within the context this process writes what it is doing; what a stage that failed had done stays."""
    global _current
    before, beat = _current, Heartbeat(folder, stage)
    _current = beat
    thread = threading.Thread(target=beat.keep_writing, name="align-beat", daemon=True)
    beat.write()
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        beat.end()
        thread.join()
        _current = before
        if failed:
            beat.write()
        else:
            beat.path.unlink(missing_ok=True)


def clear_heartbeats(folder: Path) -> None:
    """Take away what an earlier launch has left, perhaps one of more processes."""
    if is_main_process():
        for path in folder.glob(".progress-*.json"):
            path.unlink(missing_ok=True)
