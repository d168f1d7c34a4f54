"""The manifest of a round: an entry per stage with its settings, inputs, outputs, counts, cost and versions."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from align.errors import UserError
from align.files import make_folder, write_text
from align.monitoring.cost import cost_of
from align.run.hashes import content_hash, text_hash

PACKAGES = ("valley-align", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "datasets")


class SelectedRound(BaseModel):
    """The round that held-out questions chose among those so far, 0 for the first policy; and why, in a sentence.

    `checkpoint` is its content hash, `by` the setting that it was chosen by (evaluate.select_metric).
    """

    round: int
    checkpoint: str
    by: str
    why: str


class StageEntry(BaseModel):
    """What the manifest says of one stage.

    `settings` and `inputs` (name to content hash) are those it was begun with; `outputs` are the files it wrote, by
    name, with their hashes; `counts` what was kept and dropped by reason; `notes` what it fell back to; `cost` what all
    attempts in all processes took (`align.monitoring.cost`), `seconds` of it the main process's; `refused` why it did
    not continue; `image_root` the folder of the images it looked at, for the report; `selected` which of the rounds so
    far an evaluation chose (`evaluate.select: best`). A stage may add facts of its own.
    """

    model_config = ConfigDict(extra="allow")

    # `discarded`: --redo was asked for, and the files may not all be gone yet. `reopened`: with --keep-unchanged, and
    # what was finished may still stand in the stage's file.
    status: Literal["running", "complete", "discarded", "reopened"]
    started: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, Any] = Field(default_factory=dict)
    refused: str | None = None
    finished: str | None = None
    seconds: float = 0.0
    cost: dict[str, Any] = Field(default_factory=dict)
    outputs: dict[str, str] = Field(default_factory=dict)
    notes: dict[str, Any] = Field(default_factory=dict)
    image_root: str | None = None
    selected: SelectedRound | None = None

    @property
    def complete(self) -> bool:
        """Whether the stage has finished."""
        return self.status == "complete"


@dataclass(frozen=True)
class Manifest:
    """manifest.json of a round, rewritten at once each time."""

    path: Path

    def stages(self) -> dict[str, StageEntry]:
        """The entries by the names of their stages; raises UserError where the file is damaged."""
        if not self.path.is_file():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data.get("checksum", _checksum(data["stages"])) != _checksum(data["stages"]):
                raise ValueError("its checksum does not fit")
            return {name: StageEntry.model_validate(entry) for name, entry in data["stages"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"the manifest is damaged ({_problem(error)})",
                where=str(self.path),
                fix="restore it from a copy, or remove the round's folder and run it again",
            ) from None

    def stage(self, name: str) -> StageEntry | None:
        """The entry of a stage that has begun, else None; one that was discarded has not."""
        return self.begun().get(name)

    def begun(self) -> dict[str, StageEntry]:
        """The entries of all stages that have begun and were not discarded."""
        return {name: entry for name, entry in self.stages().items() if entry.status != "discarded"}

    def complete(self, name: str) -> bool:
        """Whether a stage has finished, and what it wrote is there.

        Raises UserError where its files are gone: nothing that follows could be right.
        """
        entry = self.stage(name)
        if entry is None or not entry.complete:
            return False
        missing = [output for output in entry.outputs if not (self.path.parent / output).exists()]
        if missing:
            raise UserError(
                f"stage {name} is complete, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not"
                " there",
                where=str(self.path.parent),
                fix=f"put {'it' if len(missing) == 1 else 'them'} back, or do the stage again: {self._redo(name)}",
            )
        return True

    def check_unaltered(self, name: str) -> None:
        """Raises UserError where a file of a complete stage is not as the stage wrote it: for files that nobody
        edits."""
        entry = self.stage(name)
        for file, written in entry.outputs.items() if entry is not None and entry.complete else ():
            path = self.path.parent / file
            if path.exists() and content_hash(path) != written:
                raise UserError(
                    f"the file is not the one that stage {name} wrote",
                    where=str(path),
                    fix=f"restore it from a copy, or do the stage again: {self._redo(name)}",
                )

    def begin(
        self,
        name: str,
        *,
        settings: dict[str, Any],
        inputs: dict[str, str],
        image_root: Path | None = None,
        by_record: Collection[str] = (),
    ) -> bool:
        """Enter a stage; returns False when it is complete already. Its images may move to another folder meanwhile.

        `by_record` names inputs that the stage compares record by record, and which may change while it is unfinished.

        Raises:
            UserError: the stage was begun with other settings or other inputs; resuming would mix the two.
        """
        settings = json.loads(json.dumps(settings, default=str))
        where = {"image_root": str(image_root)} if image_root is not None else {}
        entry = self.stage(name)
        if entry is None:
            entry = StageEntry(status="running", started=now(), settings=settings, inputs=inputs, versions=versions())
            self._put(name, entry.model_copy(update=where))
            return True
        held = {key: value for key, value in inputs.items() if entry.complete or key not in by_record}
        changed = _differences(entry.settings, settings)
        changed_inputs = _differences({key: entry.inputs[key] for key in entry.inputs if key in held}, held)
        if changed or changed_inputs:
            only_records = not changed and all(
                entry.inputs.get(key) == inputs.get(key) for key in {*entry.inputs, *inputs} - {*by_record}
            )
            raise UserError(
                f"stage {name} was {'finished' if entry.complete else 'begun'} with other inputs: "
                f"{'; '.join(changed + changed_inputs)}",
                where=str(self.path.parent),
                fix=self._again(name, only_records=only_records),
            )
        if not entry.complete:
            refused = {"refused": None} if entry.refused is not None else {}
            self._put(name, entry.model_copy(update=where | {"inputs": inputs, "status": "running"} | refused))
        return not self.complete(name)

    def note(self, name: str, **facts: Any) -> None:
        """Add facts to a stage that has begun and is not complete: `counts` so far, why it `refused` to continue."""
        entry = self.stage(name)
        if entry is not None and not entry.complete:
            self._put(name, entry.model_copy(update=facts))

    def finish(
        self, name: str, *, outputs: Iterable[Path], counts: dict[str, Any], seconds: float = 0.0, **more: Any
    ) -> None:
        """Mark a stage complete, with what it wrote (hashed), what it counted and what it cost.

        The cost is that of all attempts, in all processes; `seconds` counts where nothing was counted.
        """
        entry = self.stage(name)
        assert entry is not None, f"stage {name} was finished before it began"
        cost = cost_of(self.path.parent, name) or {"seconds": round(seconds, 3)}
        facts = {
            "status": "complete",
            "finished": now(),
            "seconds": cost.pop("seconds"),
            "cost": cost,
            "outputs": {path.name: content_hash(path) for path in outputs},
            "counts": counts,
        }
        self._put(name, entry.model_copy(update=facts | more))

    def amend(self, name: str, *, outputs: Iterable[Path] = (), **facts: Any) -> None:
        """Change what a complete stage says of itself, and of files that it has written anew."""
        entry = self.stage(name)
        assert entry is not None, f"stage {name} is amended before it began"
        assert entry.complete, f"stage {name} is amended before it is complete"
        written = {path.name: content_hash(path) for path in outputs}
        self._put(name, entry.model_copy(update=facts | {"outputs": entry.outputs | written}))

    def reopen(self, names: Iterable[str]) -> None:
        """Say that stages which are complete go on: what they have finished is compared with what they are to do."""
        stages = self.stages()
        for name in names:
            if name in stages and stages[name].complete:
                stages[name] = stages[name].model_copy(update={"status": "reopened", "outputs": {}})
        self._write(stages)

    def reopened(self, name: str) -> bool:
        """Whether a stage was reopened and has not begun again."""
        entry = self.stages().get(name)
        return entry is not None and entry.status == "reopened"

    def mark_discarded(self, names: Iterable[str]) -> None:
        """Say that stages count no more, before their files are removed."""
        stages = self.stages()
        for name in names:
            if name in stages:
                stages[name] = stages[name].model_copy(update={"status": "discarded"})
        self._write(stages)

    def forget(self, names: Iterable[str]) -> None:
        """Take out the entries of stages whose files are gone."""
        gone = set(names)
        self._write({name: entry for name, entry in self.stages().items() if name not in gone})

    def _again(self, name: str, *, only_records: bool) -> str:
        """What to do about a stage whose settings or inputs have changed."""
        redo = self._redo(name)
        keeping = (
            f"; with --keep-unchanged what has not changed is kept ({redo} --keep-unchanged)" if only_records else ""
        )
        return f"do it again, {redo} (this discards the round from {name} on{keeping}), or give the run another name"

    def _redo(self, name: str) -> str:
        """The command that does a stage again."""
        number = self.path.parent.name.removeprefix("round-")
        return f"align {name} --round {number} --redo" if number.isdigit() else "the same command with --redo"

    def _put(self, name: str, entry: StageEntry) -> None:
        make_folder(self.path.parent)
        self._write(self.stages() | {name: entry})

    def _write(self, stages: dict[str, StageEntry]) -> None:
        data: dict[str, Any] = {
            "stages": {name: entry.model_dump(exclude_unset=True) for name, entry in stages.items()}
        }
        data["checksum"] = _checksum(data["stages"])
        write_text(self.path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _checksum(stages: Any) -> str:
    """Of the entries as they are written: a manifest is edited by nobody."""
    return text_hash(json.dumps(stages, sort_keys=True))[:16]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of every package that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def now() -> str:
    """The time as manifests write it: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _problem(error: Exception) -> str:
    """What is wrong with a file, in a line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"no key {error}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_short(old)} and is now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
