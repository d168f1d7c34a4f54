"""The run directory: paths, locks, append-only files, manifests and lineage by content hashes.

    runs/NAME/align.yaml, report.html
    runs/NAME/round-N/{samples,scores,pairs}.jsonl, reference.*, trainer/, checkpoint/, evaluation.json, manifest.json

A stage is complete when the round's manifest says so; everything a stage writes before that is either append-only (and
continued by the same command) or temporary. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from align.errors import UserError
from align.records import Record, RecordT, parse_line, write_jsonl
from align.watch.meter import forget_spent, spent_on

STAGES = ("sample", "score", "pairs", "dpo", "evaluate")
PACKAGES = ("valley-align", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "datasets")


@dataclass(frozen=True)
class RunDir:
    """A run's folder. Round 0 stands for the first policy: it has an evaluation and nothing else."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "align.yaml"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def round(self, number: int) -> Round:
        return Round(self.path / f"round-{number}", number)

    def rounds(self) -> list[Round]:
        """The rounds that have begun, in order, round 0 included when it has been evaluated."""
        numbers = [
            int(folder.name.removeprefix("round-")) for folder in self.path.glob("round-*") if folder.name[6:].isdigit()
        ]
        return [self.round(number) for number in sorted(numbers)]

    def policy(self, number: int, first_policy: str) -> str:
        """The checkpoint that a round starts from: the first policy, or the complete checkpoint of the round before."""
        if number < 1:
            raise UserError(f"there is no round {number}", fix="rounds count from 1")
        if number == 1:
            return first_policy
        before = self.round(number - 1)
        before.need("dpo", f"round {number} starts from it", f"align dpo --round {number - 1}")
        return str(before.checkpoint)

    def remember_config(self, text: str) -> None:
        """Keep the configuration as resolved when the first stage began; later changes show in the manifests."""
        if not any(self.path.glob("round-*/manifest.json")):
            make_folder(self.path)
            write_text(self.config, text)


@dataclass(frozen=True)
class Round:
    path: Path
    number: int

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def controls(self) -> Path:
        """What the critic says of a few questions with other images than theirs."""
        return self.path / "controls.jsonl"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs.jsonl"

    @property
    def reference(self) -> Path:
        return self.path / "reference.safetensors"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluation_lines(self) -> Path:
        return self.path / "evaluation.jsonl"

    @property
    def own_log_probs(self) -> Path:
        """Log-probabilities of the evaluation's sampled responses under the checkpoint that gave them."""
        return self.path / "log-probs-own.jsonl"

    @property
    def first_log_probs(self) -> Path:
        """The same responses under the first policy."""
        return self.path / "log-probs-first.jsonl"

    @property
    def benchmarks(self) -> Path:
        """Numbers of lmms-eval's tasks; their responses lie in the folder beside it that has its name."""
        return self.path / "lmms-eval.json"

    @property
    def image_hashes(self) -> Path:
        """What images the round has worked with: hashes of their files."""
        return self.path / "images.json"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.manifest_path)

    def need(self, stage: str, why: str, command: str) -> None:
        """Raise UserError unless a stage of this round is complete."""
        if not self.manifest.complete(stage):
            raise UserError(
                f"round {self.number} has no complete {stage} stage, and {why}",
                where=str(self.path),
                fix=f"run `{command}` first",
            )

    def discard(self, stage: str) -> None:
        """Take back a stage and all later ones of this round: their files and their entries in the manifest."""
        files = {
            "sample": [self.samples],
            "score": [self.scores, self.controls],
            "pairs": [self.pairs],
            "dpo": [self.reference, self.reference.with_suffix(".json")],
            "evaluate": [self.evaluation, self.evaluation_lines, self.own_log_probs, self.first_log_probs],
        }
        for later in STAGES[STAGES.index(stage) :]:
            forget_spent(self.path, later)
            for file in files[later]:
                file.unlink(missing_ok=True)
                for part in self.path.glob(f"{file.stem}.part-*{file.suffix}"):
                    part.unlink()
        if stage != "evaluate":
            self.benchmarks.unlink(missing_ok=True)
            for folder in (self.trainer, self.checkpoint, self.benchmarks.with_suffix("")):
                if folder.exists():
                    shutil.rmtree(folder)
        if self.manifest_path.exists():
            self.manifest.forget(stage)
        if not any(self.manifest.stage(earlier) for earlier in ("sample", "score", "dpo")):
            self.image_hashes.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the round; raises UserError naming the holder when another process has it."""
        make_folder(self.path)
        holder = self.path / ".holder.json"
        lock = FileLock(str(self.path / ".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"round {self.number} is in use by {_holder(holder)}",
                where=str(self.path),
                fix="wait for it, or stop it",
            ) from None
        try:
            for unfinished in self.path.glob(".*.tmp"):
                # A process was killed right before it would have put the file in place.
                unfinished.unlink()
            write_text(
                holder,
                json.dumps(
                    {"pid": os.getpid(), "host": socket.gethostname(), "since": _now(), "command": " ".join(sys.argv)}
                ),
            )
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


@dataclass(frozen=True)
class Manifest:
    """manifest.json of a round: one entry a stage, `status` running or complete; rewritten as a whole each time."""

    path: Path

    def read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {"stages": {}}
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"the manifest is damaged ({error})",
                where=str(self.path),
                fix="restore it from a copy, or remove the round's folder and run it again",
            ) from None

    def stage(self, name: str) -> dict[str, Any] | None:
        return self.read()["stages"].get(name)

    def complete(self, name: str) -> bool:
        entry = self.stage(name)
        return entry is not None and entry["status"] == "complete"

    def begin(self, name: str, *, settings: dict[str, Any], inputs: dict[str, str]) -> bool:
        """Enter a stage; returns False when it is complete already.

        Raises:
            UserError: the stage was begun with other settings or other inputs; going on would mix the two.
        """
        settings = json.loads(json.dumps(settings, default=str))
        entry = self.stage(name)
        if entry is None:
            self._put(
                name,
                {
                    "status": "running",
                    "started": _now(),
                    "settings": settings,
                    "inputs": inputs,
                    "versions": versions(),
                },
            )
            return True
        changed = _differences(entry["settings"], settings) + _differences(entry["inputs"], inputs)
        if changed:
            raise UserError(
                f"stage {name} was {'finished' if entry['status'] == 'complete' else 'begun'} with other inputs: {'; '.join(changed)}",
                where=str(self.path.parent),
                fix=f"run it again from the start with --redo (this discards the round from {name} on), or give the run another name",
            )
        if entry.pop("refused", None) is not None:
            self._put(name, entry)
        return entry["status"] != "complete"

    def note(self, name: str, **facts: Any) -> None:
        """Add facts to a stage that has begun and is not complete: `counts` so far, why it `refused` to go on."""
        entry = self.stage(name)
        if entry is not None and entry["status"] != "complete":
            self._put(name, entry | facts)

    def finish(
        self, name: str, *, outputs: Iterable[Path], counts: dict[str, Any], seconds: float = 0.0, **more: Any
    ) -> None:
        """Mark a stage complete, with what it wrote (hashed), what it counted and what it cost.

        The cost is that of all attempts, in all processes (align.watch.meter); `seconds` counts where no meter has run.
        """
        entry = self.stage(name)
        assert entry is not None, f"stage {name} was finished before it began"
        hashes = {path.name: content_hash(path) for path in outputs}
        cost = spent_on(self.path.parent, name) or {"seconds": round(seconds, 3)}
        entry |= {
            "status": "complete",
            "finished": _now(),
            "seconds": cost.pop("seconds"),
            "cost": cost,
            "outputs": hashes,
            "counts": counts,
        } | more
        self._put(name, entry)

    def forget(self, name: str) -> None:
        """Take back a stage and every later one of the round (for --redo)."""
        data = self.read()
        for later in STAGES[STAGES.index(name) :]:
            data["stages"].pop(later, None)
        write_text(self.path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def _put(self, name: str, entry: dict[str, Any]) -> None:
        data = self.read()
        data["stages"][name] = entry
        make_folder(self.path.parent)
        write_text(self.path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


class PartialFile:
    """An append-only JSONL file of records in the order they finish, beside the file it will become.

    Each process appends to a part of its own; `merge` puts all parts in the wanted order and writes the final file at once;
    `finish` also removes the parts. A torn last line (the process was killed while writing) is cut off and its record done again.
    """

    def __init__(self, final: Path, kind: type[RecordT], rank: int = 0) -> None:
        self.final = final
        self.kind = kind
        self.path = final.with_name(f"{final.stem}.part-{rank}{final.suffix}")

    def read(self) -> dict[str, Any]:
        """The finished records of all parts by id."""
        records = {}
        for path in self._parts():
            _cut_torn_line(path)
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    record = parse_line(line, self.kind, f"{path}:{number}")
                    records[record.id] = record  # type: ignore[attr-defined]
        return records

    def append(self, record: Record) -> None:
        """Add a record and hand it to the operating system, so that a killed process loses nothing it finished."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_line() + "\n")

    def merge(self, order: Iterable[str]) -> list[Any]:
        """Write the final file in the order of ids and return its records; every id must be there."""
        records = self.read()
        ordered = [records[id_] for id_ in order]
        write_jsonl(self.final, ordered)
        return ordered

    def finish(self, order: Iterable[str]) -> list[Any]:
        """As `merge`, where nothing is left to do that needs the parts."""
        ordered = self.merge(order)
        self.discard()
        return ordered

    def discard(self) -> None:
        for path in self._parts():
            path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.final.parent.glob(f"{self.final.stem}.part-*{self.final.suffix}"))


def content_hash(path: Path) -> str:
    """sha256 of a file, or of a folder's weights, config and tokenizer (names and contents, in order of name).

    Files that do not change what the model computes (cards, trainer state, hidden files) are left out.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _is_model_file(file.name))
        if not files:
            raise UserError("no model files in the folder", where=str(path))
        with ThreadPoolExecutor(8) as pool:
            parts = [f"{file.name}:{digest}" for file, digest in zip(files, pool.map(_file_hash, files), strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return _file_hash(path)


def checkpoint_hash(reference: str) -> str:
    """The content hash of a local checkpoint; for a hub id, the id itself (its files carry their own hashes there)."""
    path = Path(reference)
    if path.is_absolute() and not path.is_dir():
        raise UserError("there is no such checkpoint folder", where=reference, fix="check policy or critic.model")
    return content_hash(path) if path.exists() else f"hub:{reference}"


def text_hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file at once: a temporary one beside it, renamed when complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder cannot be made ({error.strerror})",
            where=str(path),
            fix="check the permissions, or set run_root",
        ) from None


def versions() -> dict[str, str]:
    """The versions of Python and of every package that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _is_model_file(name: str) -> bool:
    if name.startswith(".") or name in {"README.md", "trainer_state.json", "manifest.json"}:
        return False
    return name.endswith((".safetensors", ".bin", ".json", ".jinja", ".txt", ".model", ".py"))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_short(old)} and is now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
    except (OSError, json.JSONDecodeError, KeyError):
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
