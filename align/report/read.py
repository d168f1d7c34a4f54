"""A run directory in, everything that the report shows of it out, as plain records.

Reads only; never fails on a file that is missing, half-written or damaged: what could not be read is listed in
`RunData.problems` and the report says so. Samples, scores and pairs may be large, so they are read on demand
(`RoundData.find`) and only the lines that are wanted become records.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.config import load_config
from align.errors import UserError
from align.evaluation.summary import read_summary
from align.evaluation.table import BenchmarkRow, benchmark_rows
from align.records import Evaluation, RecordT, parse_line
from align.run.folder import Round, RunDir
from align.run.manifest import SelectedRound, StageEntry
from align.run.outdated import outdated_rounds
from align.run.parents import parent_of, selected_by
from align.run.pushes import Pushes, read_pushes
from align.run.ratings import people_figures
from align.run.stages import STAGES, stage_named
from reward.intervals import Interval
from reward.reliability import Figure

JSON = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage of a round as its manifest tells it; `progress` counts finished questions of one that is
    not complete, `refused` is what it said when it ended there."""

    name: str
    status: str
    seconds: float | None = None
    counts: JSON = field(default_factory=dict)
    notes: JSON = field(default_factory=dict)
    settings: JSON = field(default_factory=dict)
    cost: JSON = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    written: str | None = None
    progress: int | None = None
    refused: str | None = None
    image_root: Path | None = None

    @property
    def complete(self) -> bool:
        """Whether the stage has finished."""
        return self.status == "complete"


@dataclass
class RoundData:
    """What one round left behind; `log` is the trainer's history, `people` how far the critic agrees with people's
    ratings, and they with each other.

    `metrics` and `lines` (held-out responses) are of the questions that are reported; `num_deciding` others decided,
    and have `selected` the best of the rounds so far. `parent` is the round that it was made from. `outdated` says what
    the round was built on, where that no longer exists.
    """

    number: int
    folder: Round
    stages: dict[str, Stage] = field(default_factory=dict)
    metrics: dict[str, Interval] = field(default_factory=dict)
    lines: list[Evaluation] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    benchmarks: list[BenchmarkRow] = field(default_factory=list)
    num_deciding: int = 0
    selected: SelectedRound | None = None
    before: int | None = None
    outdated: str | None = None
    people: dict[str, Figure] = field(default_factory=dict)

    @property
    def parent(self) -> int:
        """The round whose checkpoint this one was made from."""
        return max(self.number - 1, 0) if self.before is None else self.before

    def counts(self, stage: str) -> JSON:
        """The counts of a stage; none where it has not begun."""
        return self.stages[stage].counts if stage in self.stages else {}

    def setting(self, stage: str, *keys: str) -> Any:
        """A setting with which a stage of this round ran, as its manifest tells it; None where it does not.

        >>> score = Stage("score", "complete", settings={"critic": {"kind": "random"}})
        >>> data = RoundData(1, Round(Path(), 1), {"score": score})
        >>> data.setting("score", "critic", "kind"), data.setting("dpo", "dpo", "beta")
        ('random', None)
        """
        return _value(self.stages[stage].settings if stage in self.stages else {}, keys)

    def images_of(self, stage: str) -> Path | None:
        """The folder of the images that a stage looked at."""
        return self.stages[stage].image_root if stage in self.stages else None

    @property
    def judged(self) -> JSON:
        """Counts of the score and of the pairs stage together."""
        return self.counts("score") | self.counts("pairs")

    @property
    def evaluated(self) -> bool:
        """Whether the round has held-out metrics or responses."""
        return bool(self.metrics or self.lines)


@dataclass
class RunData:
    name: str
    path: Path
    config: JSON = field(default_factory=dict)
    config_text: str = ""
    question_images: Path | None = None
    evaluation_images: Path | None = None
    rounds: list[RoundData] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pushes: Pushes = field(default_factory=Pushes)

    @property
    def evaluated(self) -> list[RoundData]:
        """The rounds that were evaluated."""
        return [data for data in self.rounds if data.evaluated]

    @property
    def selected(self) -> SelectedRound | None:
        """The round that held-out questions have chosen, by the last evaluation; None where nothing was to choose."""
        return self.evaluated[-1].selected if self.evaluated else None

    @property
    def result(self) -> int | None:
        """The round that the run results in so far: the last evaluated one, or the one that was chosen."""
        chosen = self.selected
        return chosen.round if chosen is not None else self.evaluated[-1].number if self.evaluated else None

    @property
    def complete(self) -> list[RoundData]:
        """Rounds whose training has ended."""
        return [data for data in self.trained if "dpo" in data.stages and data.stages["dpo"].complete]

    @property
    def trained(self) -> list[RoundData]:
        """The rounds, without the first policy."""
        return [data for data in self.rounds if data.number > 0]

    def setting(self, *keys: str) -> Any:
        """A value of align.yaml by its keys, None where it is not set.

        >>> RunData("r", Path(), config={"critic": {"kind": "pairwise"}}).setting("critic", "kind")
        'pairwise'
        """
        return _value(self.config, keys)


def _value(value: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_run(path: Path) -> RunData:
    """Everything but samples, scores and pairs.

    Raises:
        UserError: there is no such folder, or it holds neither a configuration nor a round.
    """
    folder = RunDir(path)
    if not path.is_dir():
        raise UserError(
            "no such run directory", where=str(path), fix="name the folder that holds align.yaml and round-1"
        )
    rounds = folder.rounds()
    if not rounds and not folder.config.is_file():
        raise UserError(
            "not a run directory: expected align.yaml and round-N folders, found neither",
            where=str(path),
            fix="name the folder of a run (run_root/name)",
        )
    run = RunData(name=path.resolve().name, path=path)
    _read_config(run, folder.config)
    run.rounds = [_read_round(this, run.problems) for this in rounds]
    try:
        run.pushes = read_pushes(folder)
    except UserError as error:
        run.problems.append(str(error))
    outdated = outdated_rounds(rounds)
    for data in run.rounds:
        data.outdated = outdated.get(data.number)
        run.evaluation_images = data.images_of("evaluate") or run.evaluation_images
    return run


def find_records(
    path: Path, kind: type[RecordT], ids: Collection[str], problems: list[str], key: str = "id"
) -> list[RecordT]:
    """The records of a JSONL file whose `key` is one of `ids`;
    unreadable ones are listed in `problems` and left out."""
    found = []
    for where, line in _lines(path):
        try:
            if _id(line, key) in ids:
                found.append(parse_line(line, kind, where))
        except UserError as error:
            problems.append(str(error))
    return found


def iter_objects(path: Path, problems: list[str]) -> Iterator[JSON]:
    """The objects of a JSONL file, not checked any further; lines that hold none are listed in `problems`."""
    for where, line in _lines(path):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not valid JSON ({str(error).partition(':')[0]})")
            continue
        if isinstance(data, dict):
            yield data


def list_ids(path: Path) -> list[str]:
    """The ids of a JSONL file in order, without making records of its lines."""
    return [id_ for _, line in _lines(path) if (id_ := _id(line, "id")) is not None]


def _id(line: str, key: str) -> str | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, str) else None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{_short(path)}:{number}", line


def _read_config(run: RunData, path: Path) -> None:
    if not path.is_file():
        run.problems.append("align.yaml is missing: settings and image folders are not known")
        return
    run.config_text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_config(path)
    except UserError as error:
        # Written by another version, perhaps: what is there is still worth showing.
        run.problems.append(str(error))
        run.config = _loose_yaml(run.config_text)
        return
    run.config = config.model_dump(mode="json")
    run.question_images = config.question_images
    run.evaluation_images = config.evaluation_images


def _loose_yaml(text: str) -> JSON:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _read_round(this: Round, problems: list[str]) -> RoundData:
    data = RoundData(this.number, this)
    data.stages = _read_stages(this, problems)
    apart = _read_metrics(data, problems)
    for where, line in _lines(this.evaluation_lines):
        try:
            answered = parse_line(line, Evaluation, where)
        except UserError as error:
            problems.append(str(error))
            continue
        if answered.id not in apart:
            data.lines.append(answered)
    run = RunDir(this.path.parent)
    with contextlib.suppress(UserError):  # a damaged manifest, which is a problem already
        data.selected, data.before = selected_by(run, this.number), parent_of(run, this.number)
    data.log = _read_log(this, problems)
    try:
        data.people = people_figures(RunDir(this.path.parent), this.number)
    except UserError as error:
        problems.append(str(error))
    data.benchmarks = _read_benchmarks(this.benchmarks, problems)
    return data


def _read_benchmarks(path: Path, problems: list[str]) -> list[BenchmarkRow]:
    found = _read_json(path, problems)
    try:
        return benchmark_rows(found) if found else []
    except (KeyError, TypeError, AttributeError) as error:
        problems.append(f"{_short(path)}: not the results of benchmarks ({error!r})")
        return []


def _read_stages(this: Round, problems: list[str]) -> dict[str, Stage]:
    try:
        entries = this.manifest.stages()
    except UserError as error:
        problems.append(str(error))
        return {}
    return {name: _stage(this, name, entries[name]) for name in STAGES if name in entries}


def _stage(this: Round, name: str, entry: StageEntry) -> Stage:
    return Stage(
        name=name,
        status=entry.status,
        seconds=entry.seconds if entry.complete else None,
        counts=entry.counts,
        notes=entry.notes,
        settings=entry.settings,
        cost=entry.cost,
        versions=entry.versions,
        written=_when(entry.finished or entry.started),
        progress=None if entry.complete else _finished_questions(this, name),
        refused=None if entry.complete else entry.refused,
        image_root=None if entry.image_root is None else Path(entry.image_root),
    )


def _when(stamp: Any) -> str | None:
    """A manifest's time of day as people read it, to the minute.

    >>> _when("2026-01-05T10:00:00Z")
    '2026-01-05 10:00 UTC'
    """
    return f"{stamp[:10]} {stamp[11:16]} UTC" if isinstance(stamp, str) and len(stamp) >= 16 else None


def _finished_questions(this: Round, stage: str) -> int | None:
    """Complete lines in the parts that a running stage has written so far."""
    name = stage_named(stage).per_question
    if name is None:
        return None
    final = this.path / name
    parts = final.parent.glob(f"{final.stem}.part-*{final.suffix}")
    return sum(part.read_bytes().count(b"\n") for part in parts)


def _read_metrics(data: RoundData, problems: list[str]) -> set[str]:
    """Read what was measured; gives the ids of the questions that decide."""
    path = data.folder.evaluation
    if not path.is_file():
        return set()
    try:
        summary = read_summary(path)
    except UserError as error:
        problems.append(str(error))
        return set()
    data.metrics, data.num_deciding = summary.metrics, len(summary.deciding_questions)
    return summary.deciding_questions


def _read_log(this: Round, problems: list[str]) -> list[dict[str, float]]:
    """The trainer's history: of the checkpoint; while training runs, what it has logged so far."""
    states = [this.checkpoint / "trainer_state.json"]
    logged = list(iter_objects(this.trainer / "metrics.jsonl", problems)) if not states[0].is_file() else []
    if logged:
        return [{key: x for key, value in entry.items() if (x := number(value)) is not None} for entry in logged]
    states += sorted(this.trainer.glob("checkpoint-*/trainer_state.json"), key=_step_of, reverse=True)
    for path in states:
        history = _read_json(path, problems).get("log_history")
        if isinstance(history, list):
            entries = [entry for entry in history if isinstance(entry, dict)]
            return [{key: x for key, value in entry.items() if (x := number(value)) is not None} for entry in entries]
    return []


def _step_of(path: Path) -> int:
    suffix = path.parent.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


def _read_json(path: Path, problems: list[str]) -> JSON:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError, OSError) as error:
        problems.append(f"{_short(path)}: cannot be read ({error})")
        return {}
    return data if isinstance(data, dict) else {}


def number(value: Any) -> float | None:
    """A finite number as a float, None for anything else (NaN stands in some trainers' logs)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])
