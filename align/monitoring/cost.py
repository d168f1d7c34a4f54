"""What a stage takes, counted while it runs: seconds, seconds of GPUs and of processors, tokens read and written.

Every process of a stage keeps its own file in the round's folder and rewrites it every few seconds, so that what was
spent before an interruption counts: `cost_of` adds up all of them, and the manifest keeps the sum. Whoever runs a model
calls `count_tokens`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from align import accelerator
from align.distributed.ranks import rank, world_size
from align.files import read_sealed, write_sealed

EVERY_S = 10.0


@dataclass
class Cost:
    """`seconds` of the main process, `gpu_seconds` of all processes that held a GPU, `cpu_seconds` of processor time;
    tokens that went into models (prompts with their images, given texts) and that models wrote."""

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens_read: int = 0
    tokens_written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @classmethod
    def of(cls, data: Any) -> Cost:
        """From a file or a manifest, whose other keys are left out; nothing where there is none, or no number."""
        known = {field.name for field in fields(cls)}
        found = data if isinstance(data, dict) else {}
        return cls(**{key: found[key] for key in known if _is_amount(found.get(key))})


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


_tokens = Cost()
_running: list[_CostCounter] = []


def count_tokens(*, read: int = 0, written: int = 0) -> None:
    """Count tokens that a model of this process, or a server on its behalf, has read or written."""
    _tokens.tokens_read += read
    _tokens.tokens_written += written


@contextlib.contextmanager
def cost_counter(folder: Path, stage: str) -> Iterator[None]:
    """Count what this process spends on a stage meanwhile, on top of what earlier attempts have spent."""
    folder.mkdir(parents=True, exist_ok=True)
    meter = _CostCounter(_file(folder, stage, rank()))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(EVERY_S):
            meter.save()

    thread = threading.Thread(target=beat, daemon=True)
    _running.append(meter)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _running.remove(meter)
        meter.save()


def save_cost() -> None:
    """Write down what this process has spent until now: before the main process adds up."""
    for meter in _running:
        meter.save()


def cost_of(folder: Path, stage: str) -> dict[str, Any] | None:
    """All that was spent on a stage so far, for its manifest; None where nobody counted."""
    save_cost()
    files = sorted(folder.glob(_file(folder, stage, "*").name))
    if not files:
        return None
    entries = [entry for path in files if (entry := read_sealed(path)) is not None]
    if not entries:
        return None
    total = Cost()
    for entry in entries:
        total += Cost.of(entry)
    main = next((entry for entry in entries if entry.get("rank") == 0), entries[0])
    numbers = asdict(total) | {"seconds": Cost.of(main).seconds}
    rounded = {name: round(value, 3) for name, value in numbers.items()}
    return {"device": str(main.get("device", "cpu")), "num_processes": world_size()} | rounded


def forget_cost(folder: Path, stage: str) -> None:
    """Begin to count a stage anew."""
    for path in folder.glob(_file(folder, stage, "*").name):
        path.unlink()


class _CostCounter:
    """What this process has spent since the meter was made, and before, as its file says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = Cost.of(read_sealed(path))
        self.started, self.busy = time.monotonic(), time.process_time()
        self.tokens = Cost(tokens_read=_tokens.tokens_read, tokens_written=_tokens.tokens_written)
        self._writing = threading.Lock()

    def save(self) -> None:
        seconds, device = time.monotonic() - self.started, accelerator.name_in_use()
        now = Cost(
            seconds,
            0.0 if device == "cpu" else seconds,
            time.process_time() - self.busy,
            _tokens.tokens_read - self.tokens.tokens_read,
            _tokens.tokens_written - self.tokens.tokens_written,
        )
        with self._writing, contextlib.suppress(OSError):
            # A full disk stops the stage where it writes what matters.
            write_sealed(self.path, {"rank": rank(), "device": device} | asdict(self.before + now))


def _file(folder: Path, stage: str, which: int | str) -> Path:
    return folder / f".spent-{stage}-{which}.json"
