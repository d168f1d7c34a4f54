"""A run directory in, where it stands out: stages, progress, speed, losses, warnings; read-only, from any terminal.

What a running stage does is read from three sources: the round's manifest (which stages have begun and which are
complete), the process that holds the round (is it still there?), and what its processes write every two seconds
(`align.monitoring.heartbeat`). Finished questions are counted in the files themselves,
so the number also holds after a kill.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.config import CONFIG_NAME, find_config, load_config
from align.errors import UserError
from align.monitoring.format import duration
from align.monitoring.progress import figure_texts
from align.report.changes import history
from align.report.critic_quality import critic_figures
from align.report.read import RunData, read_run
from align.report.warnings import find_warnings
from align.run.folder import Round, RunDir
from align.run.manifest import StageEntry
from align.run.outdated import outdated_rounds
from align.run.parents import selected_by
from align.run.stages import STAGES, stage_named, stages_of
from align.status.stage_progress import LockHolder, StageProgress, parts, stall_warnings

# Training curves say nothing before so many steps.
MIN_STEPS = 20
NUM_LOSSES = 5


@dataclass(frozen=True)
class StageStatus:
    """One stage of one round: state is running, stopped or complete; `detail` is for a person."""

    round: int
    stage: str
    state: str
    detail: str


@dataclass(frozen=True)
class RunStatus:
    """`working` says which process is at work, empty where none is; `next_command` what resumes it,
    None while one is; `selected` which round is the best so far, and why, where the run chooses one; `servers` where
    those answer that the stage at work has started."""

    path: Path
    stages: list[StageStatus]
    warnings: list[str]
    working: str
    complete: bool
    next_command: str | None
    selected: str = ""
    servers: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What a person reads, one line per stage."""
        lines = [f"{self.path}: {self.working or ('complete' if self.complete else 'nothing is running')}"]
        lines += [f"  round {s.round}  {s.stage:<8}  {s.state:<8}  {s.detail}".rstrip() for s in self.stages]
        lines += [f"  serving {text}" for text in self.servers]
        lines += [f"  best so far: {self.selected}"] if self.selected else []
        return "\n".join([*lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def find_run(path: Path | None) -> Path:
    """The run's folder: the one named, or the one that the align.yaml there (or in the current folder) leads to."""
    if path is None:
        return load_config(find_config(None)).run_dir
    is_run = any(path.glob("round-*"))
    return path if is_run or not (path / CONFIG_NAME).is_file() else load_config(path / CONFIG_NAME).run_dir


class RunMonitor:
    """Looks at a run again and again; what it has read of growing files it does not read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tallies: dict[Path, _Tally] = {}
        self._run_warnings: tuple[Any, list[str]] = (None, [])

    def look(self) -> RunStatus:
        """The stages that have begun, in order; raises UserError where the folder is no run."""
        rounds = RunDir(self.path).rounds()
        if not rounds:
            raise UserError(
                "no round has begun here", where=str(self.path), fix="name a run's folder, such as runs/run"
            )
        stages: list[StageStatus] = []
        warnings: list[str] = []
        working = ""
        servers: tuple[str, ...] = ()
        for this in rounds:
            at_work = LockHolder.of(this)
            servers = tuple(one.text for one in at_work.servers) if at_work.alive else servers
            working = working or (at_work.text if at_work.alive else "")
            entries = this.manifest.begun()
            for name in STAGES:
                found = self._stage(this, name, entries.get(name), at_work, warnings)
                stages += [found] if found else []
        warnings += self._known_warnings(rounds, stages)
        complete = _is_complete(self.path, rounds)
        command = None if working else self._next(rounds, complete)
        return RunStatus(
            self.path, stages, warnings, working, complete and not working, command, self._selected(rounds), servers
        )

    @staticmethod
    def _selected(rounds: list[Round]) -> str:
        """What the last evaluation has chosen."""
        run = RunDir(rounds[0].path.parent)
        chosen = [found for this in rounds if (found := selected_by(run, this.number)) is not None]
        return chosen[-1].why if chosen else ""

    @staticmethod
    def _next(rounds: list[Round], complete: bool) -> str:
        """The command that resumes: of a run that `align run` would refuse, the one that makes it whole again."""
        for this in rounds:
            for name, entry in this.manifest.begun().items():
                if entry.complete and name in STAGES and _missing(this, name, entry):
                    return f"align {name} --round {this.number} --redo"
        outdated = min(outdated_rounds(rounds), default=None)
        parent = None if outdated is None else RunDir(rounds[0].path.parent).round(outdated - 1).manifest.stage("dpo")
        if parent is not None and parent.complete:
            return f"align sample --round {outdated} --redo"
        return "align report" if complete else "align run"

    def _stage(
        self, this: Round, name: str, entry: StageEntry | None, at_work: LockHolder, warnings: list[str]
    ) -> StageStatus | None:
        here = at_work.stage == name
        if entry is None and not (here and at_work.alive):
            return None
        if entry is not None and entry.complete:
            warnings += _lost(this.number, name, entry.counts, so_far=False)
            warnings += _missing(this, name, entry)
            warnings += [f"round {this.number} {name}: {note}" for note in _fallbacks(entry.notes)]
            return StageStatus(this.number, name, "complete", f"{duration(entry.seconds)}, {_counts(entry.counts)}")
        running = here and at_work.alive
        heartbeats = at_work.heartbeats if here else []
        warnings += _lost(this.number, name, self._so_far(this, name), so_far=True)
        warnings += [
            f"round {this.number} {name}: {warning}" for warning in (stall_warnings(heartbeats) if running else [])
        ]
        progress, losses = StageProgress.of(this, heartbeats, self._num_lines), ""
        if name == "dpo" and (logged := _logged(this)):
            # Written with every step, and so ahead of the heartbeats.
            losses = _losses(logged[-NUM_LOSSES:])
            if progress.steps:
                progress = replace(progress, done=max(progress.done, logged[-1]["step"]), figures={})
        detail = progress.text(name, running=running)
        per_question = stage_named(name).per_question
        if not detail and per_question is not None:
            detail = f"{self._num_lines(parts(this, Path(per_question).stem))} questions finished"
        detail = ", ".join(filter(None, [detail, losses]))
        if entry is not None and not running and entry.refused:
            warnings.append(f"round {this.number} {name}: {entry.refused}")
        return StageStatus(this.number, name, "running" if running else "stopped", detail)

    def _so_far(self, this: Round, name: str) -> dict[str, Any]:
        """What has been lost of a stage that is not complete, counted from its parts."""
        per_question = stage_named(name).per_question
        if per_question is None:
            return {}
        counts: Counter[str] = Counter()
        unscored: Counter[str] = Counter()
        for path in parts(this, Path(per_question).stem):
            tally = self._tally(path)
            counts, unscored = counts + tally.counts, unscored + tally.unscored
        return dict(counts) | {"unscored": dict(unscored)}

    def _tally(self, path: Path) -> _Tally:
        tally = self._tallies.setdefault(path, _Tally(path))
        tally.read_on()
        return tally

    def _num_lines(self, paths: list[Path]) -> int:
        return sum(self._tally(path).num_lines for path in paths)

    def _known_warnings(self, rounds: list[Round], stages: list[StageStatus]) -> list[str]:
        """The report's warnings that hold by now; computed again when a stage has moved, or a training by a tenth."""
        key = (
            [(stage.round, stage.stage, stage.state) for stage in stages],
            [round(math.log(1 + _num_logged(this), 1.1)) for this in rounds],
        )
        if self._run_warnings[0] != key:
            self._run_warnings = (key, _run_warnings(read_run(self.path)))
        return self._run_warnings[1]


def run_status(path: Path) -> RunStatus:
    """Where a run stands now; raises UserError where the folder is no run."""
    return RunMonitor(path).look()


class _Tally:
    """What is lost in a growing file of samples or scores, read on from where it was read to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.unscored: Counter[str] = Counter()
        self.num_lines = 0
        self._offset = 0

    def read_on(self) -> None:
        whole = b""
        # The file goes when its stage is complete.
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._offset)
            # The last line may not be whole yet.
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.split(b"\n") if whole else []:
            self.num_lines += 1
            # A line that is damaged is reported by the stage that reads it.
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                self._add(json.loads(line))
        self._offset += len(whole) + (1 if whole else 0)

    def _add(self, record: dict[str, Any]) -> None:
        for response in record.get("responses", []):
            self.counts["responses"] += 1
            self.counts["truncated"] += response.get("finish_reason") == "length"
            self.counts["empty"] += not response.get("text", "").strip()
        self.unscored.update(record.get("unscored", {}).values())


# Counts of what a stage has lost, and what it is called; of a complete stage the first two stand beside its counts.
LOSSES = {
    "left_out": "questions left out",
    "truncated": "responses cut off at the longest length",
    "empty": "responses without text",
    "unscored": "responses unscored",
    "dropped_too_long": "pairs dropped: too long",
    "dropped": "pairs dropped",
    "unjudged_initial": "comparisons with the first policy not judged",
    "unjudged_parent": "comparisons with the round before not judged",
}


def _lost(number: int, stage: str, counts: dict[str, Any], *, so_far: bool) -> list[str]:
    found = []
    for name, words in LOSSES.items():
        count = _total(counts.get(name))
        if count and (so_far or name not in ("truncated", "empty")):
            reasons = counts[name] if isinstance(counts[name], dict) else {}
            why = (
                ": " + ", ".join(f"{reason} ({n})" for reason, n in Counter(reasons).most_common(3)) if reasons else ""
            )
            found.append(f"round {number} {stage}: {count} {words}{' so far' if so_far else ''}{why}")
    return found


def _missing(this: Round, name: str, entry: StageEntry) -> list[str]:
    """Of a complete stage: what it wrote and is no longer there."""
    gone = [output for output in entry.outputs if not (this.path / output).exists()]
    again = f"put it back, or do the stage again: align {name} --round {this.number} --redo"
    return [f"round {this.number} {name}: {' and '.join(gone)} not there any more; {again}"] if gone else []


def _total(value: Any) -> int:
    """A count, or counts by reason added up; 0 for anything else.

    >>> _total(3), _total({"no answer": 2, "torn": 1}), _total({"bias": 0.5}), _total(None)
    (3, 3, 0, 0)
    """
    if isinstance(value, dict):
        return sum(value.values()) if all(type(count) is int for count in value.values()) else 0
    return value if type(value) is int else 0


def _fallbacks(notes: dict[str, Any]) -> list[str]:
    """What did not go the usual way, as the stage noted it."""
    return [str(notes["batch"])] if "batch" in notes else []


def _losses(lines: list[dict[str, Any]]) -> str:
    """The last losses of a training, and the numbers beside the very last one."""
    last = lines[-1]
    texts = ["last losses " + " ".join(f"{line['loss']:.4f}" for line in lines)]
    names = {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    return ", ".join([*texts, *figure_texts({ours: last[trls] for trls, ours in names.items() if trls in last})])


def _logged(this: Round) -> list[dict[str, Any]]:
    path = this.trainer / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _num_logged(this: Round) -> int:
    path = this.trainer / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _run_warnings(run: RunData) -> list[str]:
    """The report's warnings but for those about a training that has hardly begun,
    and that something is not finished."""
    training = {data.number for data in run.trained if "dpo" in data.stages and not data.stages["dpo"].complete}
    for data in run.trained:
        if data.number in training and len(data.log) < MIN_STEPS:
            data.log = []
    critics = {data.number: critic_figures(data) for data in run.trained}
    found = [warned for warned in find_warnings(run, history(run), critics) if warned.title != "Not finished"]
    return [
        (f"round {number}: " if number is not None else "")
        + f"{warned.title}. {finding.replace('at the end of training', 'by now') if number in training else finding}"
        for warned in found
        for number, finding in warned.findings
    ]


def _is_complete(path: Path, rounds: list[Round]) -> bool:
    """Whether the last round that the run's configuration asks for has been trained, and evaluated where asked for."""
    try:
        config = load_config(path / CONFIG_NAME)
    except UserError:
        return False
    last = next((this for this in rounds if this.number == config.rounds), None)
    if last is None:
        return False
    entries = last.manifest.begun()
    return all(stage.name in entries and entries[stage.name].complete for stage in stages_of(config, last.number))


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{total} {name.replace('_', ' ')}" for name, value in counts.items() if (total := _total(value)))
