"""A run directory in, where it stands out: stages, progress, speed, last losses; read-only, from any terminal."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.rundir import STAGES, Round, RunDir

PARTS = {"sample": "samples", "score": "scores", "evaluate": "evaluation"}


@dataclass(frozen=True)
class StageStatus:
    """One stage of one round: state is waiting, running, stopped or complete; `detail` is for a person."""

    round: int
    stage: str
    state: str
    detail: str


def run_status(path: Path) -> list[StageStatus]:
    """The stages that have begun, in order; raises UserError where the folder is no run."""
    rounds = RunDir(path).rounds()
    if not rounds:
        raise UserError("no round has begun here", where=str(path), fix="name a run's folder, such as runs/run")
    return [status for this in rounds for stage in STAGES if (status := _stage(this, stage)) is not None]


def holder(this: Round) -> dict[str, Any] | None:
    """Who works on a round now (pid, host, since, command), as it said itself."""
    try:
        return json.loads((this.path / ".holder.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _stage(this: Round, stage: str) -> StageStatus | None:
    entry = this.manifest.stage(stage)
    if entry is None:
        return None
    if entry["status"] == "complete":
        return StageStatus(this.number, stage, "complete", f"{entry['seconds']:.0f} s, {_counts(entry['counts'])}")
    state = "running" if holder(this) else "stopped"
    return StageStatus(this.number, stage, state, _progress(this, stage, entry))


def _progress(this: Round, stage: str, entry: dict[str, Any]) -> str:
    if stage == "dpo":
        return _losses(this)
    parts = list(this.path.glob(f"{PARTS.get(stage, stage)}.part-*.jsonl"))
    done = sum(part.read_bytes().count(b"\n") for part in parts)
    seconds = max(time.time() - _timestamp(entry["started"]), 1.0)
    return f"{done} questions finished, {done / seconds:.2f}/s since it began"


def _losses(this: Round) -> str:
    path = this.trainer / "metrics.jsonl"
    if not path.is_file():
        return "preparing (reference log-probabilities)"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    lines = [line for line in lines if "loss" in line]
    if not lines:
        return "no step yet"
    last = lines[-1]
    margin = last.get("rewards/margins")
    return f"step {last.get('step')}: loss {last['loss']:.4f}" + (
        f", margin {margin:.3f}" if margin is not None else ""
    )


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{value} {name}" for name, value in counts.items() if isinstance(value, int) and value)


def _timestamp(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
