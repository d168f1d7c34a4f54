"""Who is at work on a round and how far they have come, from what the processes themselves write
(`align.monitoring.heartbeat`).

Finished questions are counted in the files that hold them, so the number is exact, also after a kill.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.files import read_sealed
from align.monitoring.format import duration, rate, size
from align.monitoring.progress import figure_texts
from align.run.folder import Round
from align.run.server_addresses import ServerAddresses, published

# A process writes every two seconds; after so long without a sign it is gone, or its machine is.
SILENT_S = 60.0
# Without any step for so long, and for so many times as long as a step takes, something may hang.
STALE_S, STALE_STEPS = 300.0, 5.0
# Before the first step weights are loaded and the first batch is done.
FIRST_STEP_S = 900.0


@dataclass(frozen=True)
class LockHolder:
    """Who holds a round, as it says itself, and whether it is still there; `heartbeats` are what its processes wrote
    last, `servers` those that they have started."""

    stage: str | None
    alive: bool
    text: str
    since: str
    heartbeats: list[dict[str, Any]]
    servers: tuple[ServerAddresses, ...] = ()

    @classmethod
    def of(cls, this: Round) -> LockHolder:
        """The process that holds a round now, or held it last."""
        files = sorted(this.path.glob(".progress-*.json"))
        heartbeats = [data for path in files if (data := read_sealed(path)) is not None]
        holder = read_sealed(this.path / ".holder.json")
        main = next(
            (heartbeat for heartbeat in heartbeats if heartbeat.get("work")), heartbeats[0] if heartbeats else None
        )
        stage = main["stage"] if main else None
        if holder is None:
            return cls(stage, False, "", "", heartbeats)
        # What an earlier holder has left, which was killed, says nothing of this one.
        since = _timestamp(holder["since"]) - 1
        heartbeats = [heartbeat for heartbeat in heartbeats if heartbeat["alive"] >= since]
        servers = tuple(one for one in published(this.server_logs) if one.since >= since)
        if heartbeats:
            stage = heartbeats[0]["stage"]
        elif stage is None:
            # It has the round, and waits for the processes beside it.
            begun = this.manifest.stages()
            stage = next((name for name, entry in begun.items() if entry.status == "running"), None)
        count = f"{len(heartbeats)} processes, " if len(heartbeats) > 1 else ""
        age = duration(max(time.time() - _timestamp(holder["since"]), 0))
        text = (
            f"round {this.number} {stage or ''} is running ({count}process {holder['pid']} on {holder['host']}, for"
            f" {age})"
        )
        alive = _is_alive(holder, heartbeats)
        return cls(stage, alive, text.replace("  ", " "), f"since {holder['since']}", heartbeats, servers)


def _is_alive(holder: dict[str, Any], heartbeats: list[dict[str, Any]]) -> bool:
    """Whether the process is there; on another machine it is believed as long as it writes."""
    if holder["host"] != socket.gethostname():
        return not heartbeats or time.time() - max(heartbeat["alive"] for heartbeat in heartbeats) < SILENT_S
    import psutil

    try:
        # A number may have been given to another process since.
        return psutil.Process(holder["pid"]).create_time() <= _timestamp(holder["since"]) + 2
    except psutil.NoSuchProcess:
        return False


def parts(this: Round, stem: str) -> list[Path]:
    """The files that the processes of a running stage append to, one each."""
    return sorted(this.path.glob(f"{stem}.part-*.jsonl"))


def num_lines(paths: list[Path]) -> int:
    """Whole lines in files, some of which may vanish meanwhile."""
    count = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            count += path.read_bytes().count(b"\n")
    return count


@dataclass(frozen=True)
class StageProgress:
    """How far all processes of a stage have come together with what they are doing now."""

    label: str = ""
    done: int = 0
    total: int = 0
    speed: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    memory: str = ""
    steps: bool = False

    @classmethod
    def of(
        cls, this: Round, heartbeats: list[dict[str, Any]], count: Callable[[list[Path]], int] = num_lines
    ) -> StageProgress:
        """What the heartbeats of a stage's processes say together; `count` counts the finished lines of its parts."""
        works = [heartbeat["work"] for heartbeat in heartbeats if heartbeat.get("work")]
        if not works:
            return cls(memory=_memory(heartbeats))
        first = works[0]
        together = works[:1] if first["scope"] == "same" else works
        own = sum(work["own"] for work in together)
        if first["scope"] == "own":
            done, total = own + sum(work["before"] for work in works), sum(work["total"] for work in works)
        else:
            done, total = first["before"] + own, first["total"]
        files = parts(this, first["parts"]) if first["parts"] else []
        if files:
            done = count(files)
        speed = sum(work["speed"] for work in together)
        return cls(
            first["label"],
            min(done, total),
            total,
            speed,
            first["figures"],
            _memory(heartbeats),
            first["scope"] == "same",
        )

    def text(self, stage: str, *, running: bool) -> str:
        """How far, how fast, how long still; empty where nothing is known."""
        if not self.label:
            return f"starting, {self.memory}" if running and self.memory else ""
        what = self.label.partition(": ")[2] or self.label
        what = "step " if self.steps else "" if what == stage else f"{what} "
        texts = [f"{what}{self.done} of {self.total} ({100 * self.done // max(self.total, 1)} %)"]
        if running and self.speed and self.done < self.total:
            texts += [rate(self.speed), f"{duration((self.total - self.done) / self.speed)} left"]
        return ", ".join(filter(None, [*texts, *figure_texts(self.figures), self.memory if running else ""]))


def stall_warnings(heartbeats: list[dict[str, Any]]) -> list[str]:
    """Whether a process has fallen silent, or all of them make no progress."""
    now = time.time()
    found = [
        f"process {number} has not been heard of for {duration(now - heartbeat['alive'])}"
        for number, heartbeat in enumerate(heartbeats)
        if now - heartbeat["alive"] > SILENT_S
    ]
    works = [heartbeat["work"] for heartbeat in heartbeats if heartbeat.get("work")]
    moved = [work["moved"] for work in works if work["moved"] is not None]
    if moved:
        idle, speed = now - max(moved), sum(work["speed"] for work in works)
        if idle > max(STALE_S, STALE_STEPS / max(speed, 1e-9)):
            found.append(f"no progress for {duration(idle)}, where {rate(speed)} was usual")
    elif heartbeats and now - min(heartbeat["started"] for heartbeat in heartbeats) > FIRST_STEP_S:
        found.append(
            f"nothing is finished after {duration(now - min(heartbeat['started'] for heartbeat in heartbeats))}"
        )
    return found


def _memory(heartbeats: list[dict[str, Any]]) -> str:
    """Of the process that takes most."""
    if not heartbeats:
        return ""
    most = max((heartbeat["memory"] for heartbeat in heartbeats), key=lambda memory: memory["peak"])
    each = " in the largest process" if len(heartbeats) > 1 else ""
    return f"memory {size(most['used'])} (peak {size(most['peak'])}){each}"


def _timestamp(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
