"""A run's folder: the paths of its rounds, and the lock that lets one process at a time work on a round.

    runs/NAME/align.yaml, report.html
    runs/NAME/round-N/{samples,scores,pairs}.jsonl, reference.*, trainer/, checkpoint/, evaluation.json, manifest.json

A stage is complete when the round's manifest says so; everything a stage writes before that is either append-only (and
continued by the same command) or temporary. No torch here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel

from align.errors import UserError
from align.files import make_folder, read_sealed, write_sealed, write_text
from align.monitoring.cost import forget_cost
from align.run.hashes import checkpoint_hash
from align.run.manifest import Manifest, now
from align.run.resumable import PartialFile
from align.run.stages import TABLE, stages_from

# The first line of a run's own align.yaml.
RESOLVED = (
    "# The configuration of this run, as resolved when it began. Written by the toolkit, not read for a new run.\n"
)


@dataclass(frozen=True)
class RunDir:
    """A run's folder. Round 0 stands for the first policy: it has an evaluation and nothing else."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration as resolved when the run began."""
        return self.path / "align.yaml"

    @property
    def evaluation_hashes(self) -> Path:
        """The contents of held-out images, which all rounds must be shown alike."""
        return self.path / "evaluation-images.json"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    def round(self, number: int) -> Round:
        """The folder of a round."""
        return Round(self.path / f"round-{number}", number)

    def rounds(self) -> list[Round]:
        """The rounds that have begun, in order, round 0 included when it has been evaluated."""
        numbers = [
            int(folder.name.removeprefix("round-")) for folder in self.path.glob("round-*") if folder.name[6:].isdigit()
        ]
        return [self.round(number) for number in sorted(numbers)]

    def checkpoint(self, number: int, first_policy: str) -> str:
        """The complete checkpoint of a round; of round 0 the first policy."""
        if number == 0:
            return first_policy
        this = self.round(number)
        this.need("dpo", "its checkpoint is asked for", f"align dpo --round {number}")
        return str(this.checkpoint)

    def trained_hash(self, number: int, checkpoint: str) -> str:
        """The content hash of a round's `checkpoint` (round 0: of the first policy).

        Raises:
            UserError: a file of it has changed since the round trained it.
        """
        found = checkpoint_hash(checkpoint)
        trained = self.round(number).manifest.stage("dpo") if number else None
        if trained is not None and trained.outputs.get("checkpoint", found) != found:
            raise UserError(
                f"the checkpoint is not the one that round {number} has trained: a file of it has changed",
                where=checkpoint,
                fix=f"restore it from a copy, or train it again: align dpo --round {number} --redo",
            )
        return found

    def write_config_once(self, text: str) -> None:
        """Keep the configuration as resolved when the first stage began; later changes show in the manifests.

        Raises UserError where a file of that name is there that was not written here: a person's own.
        """
        if any(self.path.glob("round-*/manifest.json")):
            return
        make_folder(self.path)
        if self.config.is_file() and not self.config.read_bytes().startswith(RESOLVED.encode()):
            raise UserError(
                "the run's folder holds a configuration that this toolkit has not written, and would write its own"
                " over it",
                where=str(self.config),
                fix="give the run a folder of its own: set name, or run_root",
            )
        write_text(self.config, RESOLVED + text)


@dataclass(frozen=True)
class Round:
    path: Path
    number: int

    @property
    def samples(self) -> Path:
        """A line per question: its responses."""
        return self.path / "samples.jsonl"

    @property
    def scores(self) -> Path:
        """A line per question: rewards and their evidence."""
        return self.path / "scores.jsonl"

    @property
    def controls(self) -> Path:
        """What the critic says of a few questions with other images than theirs."""
        return self.path / "controls.jsonl"

    @property
    def ratings(self) -> Path:
        """What people prefer of the responses (`align label`); a person's own file, which no stage removes."""
        return self.path / "ratings.jsonl"

    @property
    def pairs(self) -> Path:
        """A line per preference pair."""
        return self.path / "pairs.jsonl"

    @property
    def reference(self) -> Path:
        """Reference log-probabilities of the pairs."""
        return self.path / "reference.safetensors"

    @property
    def server_logs(self) -> Path:
        """What servers that a stage started have printed, and what they were given."""
        return self.path / "servers"

    @property
    def trainer(self) -> Path:
        """What an interrupted training resumes from."""
        return self.path / "trainer"

    @property
    def checkpoint(self) -> Path:
        """The round's checkpoint."""
        return self.path / "checkpoint"

    @property
    def evaluation(self) -> Path:
        """Held-out metrics."""
        return self.path / "evaluation.json"

    @property
    def evaluation_lines(self) -> Path:
        """Held-out responses."""
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
    def other_image_answers(self) -> Path:
        """What the checkpoint says of a few held-out questions with other images than theirs."""
        return self.path / "other-image-answers.jsonl"

    @property
    def image_log_probs(self) -> Path:
        """Log-probabilities of its answers to these questions under their own images and the others."""
        return self.path / "log-probs-images.jsonl"

    @property
    def comparisons(self) -> Path:
        """What the critic prefers of the greedy held-out responses: this round's, the first policy's, the parent's."""
        return self.path / "comparisons.jsonl"

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
        """The file of the manifest."""
        return self.path / "manifest.json"

    @property
    def manifest(self) -> Manifest:
        """The round's manifest."""
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
        """Take back a stage and all later ones of this round: their entries in the manifest and their files.

        The manifest is written first: killed in between, the stages count as not begun,
        and `settle` removes what is left.
        """
        later = stages_from(stage)
        self.manifest.mark_discarded(row.name for row in later)
        for row in later:
            forget_cost(self.path, row.name)
            for name in (*row.writes, *row.leaves):
                self._remove(self.path / name)
        self.manifest.forget(row.name for row in later)
        if not any(row.shows_images and self.manifest.stage(row.name) for row in TABLE):
            self.image_hashes.unlink(missing_ok=True)

    def reopen(self, stage: str) -> None:
        """Let a stage and the later ones go on as if they were unfinished, with what they have finished question by
        question.

        They do again what has changed. What stands for a round as a whole (pairs, a checkpoint) is taken back.
        """
        rows = stages_from(stage)
        kept = tuple(itertools.takewhile(lambda row: row.per_question is not None, rows))
        if len(kept) < len(rows):
            self.discard(rows[len(kept)].name)
        self.manifest.reopen(row.name for row in kept)
        for row in kept:
            for name in (*row.writes, *row.leaves):
                if name != row.per_question:
                    self._remove(self.path / name)
        self.settle()

    def settle(self) -> None:
        """End what a kill has interrupted: files of stages that were discarded or reopened, temporary files."""
        for name, entry in self.manifest.stages().items():
            if entry.status == "discarded":
                self.discard(name)
                break
        for row in TABLE:
            if row.per_question is not None and self.manifest.reopened(row.name):
                partial = PartialFile(self.path / row.per_question, BaseModel)
                if partial.final.is_file():
                    partial.reopen()
        for unfinished in self.path.glob(".*.tmp"):
            unfinished.unlink()

    @staticmethod
    def _remove(path: Path) -> None:
        """A file with its parts, or a folder."""
        if path.is_dir():
            shutil.rmtree(path)
            return
        path.unlink(missing_ok=True)
        for part in path.parent.glob(f"{path.stem}.part-*{path.suffix}"):
            part.unlink()

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
            self.settle()
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "command": " ".join(sys.argv)}
            write_sealed(holder, facts)
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def _holder(path: Path) -> str:
    holder = read_sealed(path)
    if holder is None or not {"pid", "host", "since", "command"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
