"""Names of lmms-eval's tasks and a checkpoint in; their numbers (`lmms-eval.json`) and every response out.

lmms-eval prepares the questions and computes the metrics; the checkpoint is opened by this toolkit's loader, native
families included, and answers through its engine. Each task is one entry of a manifest in
the folder `lmms-eval/` beside the
results: finished responses are kept, the same command resumes after an interruption, a finished task does nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from align.config import Config
from align.distributed.ranks import barrier, is_main_process, rank, world_size
from align.engines.open import open_engine, open_policy, served_as
from align.errors import UserError
from align.files import make_folder, write_text
from align.lmms_eval.instances import Answered
from align.lmms_eval.requests import Answerer
from align.lmms_eval.results import counts_of, numbers_of
from align.lmms_eval.tasks import find_tasks, load_task, require_lmms_eval, root_cause
from align.log import log
from align.run.folder import RunDir
from align.run.hashes import checkpoint_hash
from align.run.manifest import Manifest
from align.run.resumable import PartialFile
from align.run.sharding import begin

if TYPE_CHECKING:
    from align.engines.base import Engine


@dataclass(frozen=True)
class Wishes:
    """What was asked for on the command line, in its own words; `tasks` with commas between them.

    Without `checkpoint` it is that of a round of the run.
    """

    tasks: str
    checkpoint: str | None = None
    folder: Path | None = None
    limit: int | None = None
    out: Path | None = None
    redo: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the tasks, each once."""
        return list(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))

    def results(self, config: Config, number: int) -> Path:
        """The JSON file; responses lie in a folder beside it that has its name without the suffix."""
        if self.out is not None:
            return self.out
        if self.checkpoint is not None:
            return Path(f"{Path(self.checkpoint).resolve().name}.lmms-eval.json")
        return RunDir(config.run_dir).round(number).benchmarks

    def arguments(self) -> list[str]:
        """The same on the command line of another process."""
        options = {
            "--lmms-eval": self.tasks,
            "--checkpoint": self.checkpoint,
            "--lmms-eval-tasks": self.folder,
            "--limit": self.limit,
            "--out": self.out,
        }
        given = [str(part) for option, value in options.items() if value is not None for part in (option, value)]
        return given + (["--redo"] if self.redo else [])


@dataclass(frozen=True)
class Work:
    """What all tasks of a command have in common."""

    config: Config
    checkpoint: str
    number: int | None
    out: Path
    manager: Any
    limit: int | None
    version: str

    @property
    def folder(self) -> Path:
        """The folder of responses and the manifest."""
        return self.out.with_suffix("")

    @property
    def manifest(self) -> Manifest:
        """The manifest of the tasks."""
        return Manifest(self.folder / "manifest.json")

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished task was run with."""
        model = self.config.model.model_dump(exclude={"device", "allow_pickle"})
        return {"lmms-eval": self.version, "limit": self.limit, "model": model}


def list_tasks(folder: Path | None) -> list[str]:
    """Every task's name, with what it is where it stands for several.

    Raises:
        UserError: lmms-eval is not installed.
    """
    require_lmms_eval()
    index = find_tasks([], folder).task_index
    return [
        name if entry["type"].endswith("task") else f"{name} ({entry['type']})" for name, entry in sorted(index.items())
    ]


def run_benchmarks(config: Config, wishes: Wishes, number: int) -> None:
    """Run all tasks on a checkpoint, by default that of a round (0: the first policy), and write the JSON file.

    Raises:
        UserError: lmms-eval is missing, a task is unknown, not supported or without its dataset (before weights are
            loaded), or a task was begun with another checkpoint or other settings.
    """
    if not wishes.names:
        raise UserError("no task is named", fix="name some: --lmms-eval mme,mmbench_en_dev")
    version = require_lmms_eval()
    work = Work(
        config,
        checkpoint=wishes.checkpoint or RunDir(config.run_dir).checkpoint(number, config.policy),
        number=None if wishes.checkpoint else number,
        out=wishes.results(config, number),
        manager=find_tasks(wishes.names, wishes.folder),
        limit=wishes.limit,
        version=version,
    )
    inputs = {"checkpoint": _checked(work)}
    if work.number is not None:
        inputs |= served_as(config.evaluate.servers, work.number)
    _load_tasks(work, wishes)
    make_folder(work.folder)
    with _held(work.folder):
        engine = cache(lambda: _open(work))
        for name in wishes.names:
            _run_task(work, name, engine, inputs, redo=wishes.redo)
            if is_main_process():
                _write_summary(work, inputs["checkpoint"])
        barrier()


def _checked(work: Work) -> str:
    """The hash of the checkpoint, whose files have been looked at where it is opened here."""
    if work.number is None or not work.config.evaluate.servers:
        from align.models.load import check_checkpoint

        check_checkpoint(work.checkpoint, allow_pickle=work.config.model.allow_pickle)
    return checkpoint_hash(work.checkpoint)


def _load_tasks(work: Work, wishes: Wishes) -> None:
    """Load what is not finished; the main process first, which fetches datasets, so that the others find them."""
    if not is_main_process():
        barrier()
    for name in wishes.names:
        if wishes.redo or not work.manifest.complete(name):
            load_task(work.manager, name)
    if is_main_process():
        barrier()


def _run_task(work: Work, name: str, engine: Callable[[], Engine], inputs: dict[str, str], *, redo: bool) -> None:
    manifest = work.manifest
    file_name = re.sub(r"[^\w.-]", "_", name) + ".jsonl"
    partial = PartialFile(work.folder / file_name, Answered, rank())
    if redo and is_main_process():
        _discard(manifest, name, partial)
    try:
        if not begin(manifest, name, settings=work.settings, inputs=inputs):
            log.info("%s is done already: %s", name, work.out)
            return
    except UserError as error:
        raise UserError(error.message, where=error.where, fix="start over with --redo, or name another --out") from None
    started = time.monotonic()
    frames = work.config.model.video_frames
    answerer = Answerer(engine, partial, label=name, video_frames=frames, num_processes=world_size())
    found = _evaluated(work, name, answerer)
    used = _of_all_processes(answerer.used)
    if is_main_process():
        known = partial.read()
        records = partial.finish(sorted(used, key=lambda id_: (known[id_].task, known[id_].doc_id)))
        manifest.finish(
            name,
            outputs=[partial.final],
            counts=counts_of(records),
            seconds=time.monotonic() - started,
            notes=answerer.notes,
            results=numbers_of(found),
            responses=f"{work.folder.name}/{file_name}",
        )
    barrier()


def _evaluated(work: Work, name: str, answerer: Answerer) -> dict[str, Any]:
    """What lmms-eval's evaluator gives; on other processes than the main one nothing."""
    from lmms_eval.evaluator import simple_evaluate

    from align.lmms_eval.model import as_model

    try:
        found = simple_evaluate(
            model=as_model(answerer),
            tasks=[name],
            task_manager=work.manager,
            limit=work.limit,
            log_samples=False,
            verbosity="WARNING",
            # What some tasks' metrics want of lmms-eval's own command line.
            cli_args=Namespace(output_path=str(work.folder), process_with_media=False, reasoning_tags=None),
        )
    except ImportError as error:
        raise UserError(f"the task's metrics need a package: {error}", where=name, fix=_KEPT) from error
    except Exception as error:
        if not hasattr(error, "last_attempt"):
            raise
        raise UserError(f"the task's metrics failed: {root_cause(error)}", where=name, fix=_KEPT) from error
    return found or {}


_KEPT = "fix that; the responses are kept, and the same command resumes"


def _write_summary(work: Work, digest: str) -> None:
    """The JSON file: all tasks that the manifest knows as finished, of this and of earlier commands."""
    kept = ("settings", "finished", "seconds", "counts", "notes", "results", "responses")
    entries = {name: entry.model_dump() for name, entry in work.manifest.stages().items() if entry.complete}
    summary = {
        "checkpoint": work.checkpoint,
        "checkpoint_sha256": digest,
        "round": work.number,
        "lmms_eval": work.version,
        "tasks": {
            name: {key: entry[key] for key in kept} | {"checkpoint_sha256": entry["inputs"]["checkpoint"]}
            for name, entry in entries.items()
        },
    }
    write_text(work.out, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _open(work: Work) -> Engine:
    config = work.config
    if work.number is not None:
        servers = config.evaluate.servers
        return open_policy(config, work.checkpoint, servers, made_in_round=work.number, open_image=_as_it_is)
    return open_engine(
        work.checkpoint,
        config.model,
        open_image=_as_it_is,
        processor=config.model.processor,
        shared_prefix=config.shared_prefix,
        batch_size=config.sample.batch_size,
    )


def _as_it_is(image: Any) -> Any:
    """The pictures of requests are open already."""
    return image


def _discard(manifest: Manifest, name: str, partial: PartialFile) -> None:
    manifest.mark_discarded([name])
    partial.discard()
    partial.final.unlink(missing_ok=True)
    manifest.forget([name])


def _of_all_processes(ids: list[str]) -> list[str]:
    """The ids of every process, in the order of ranks, each once."""
    if world_size() > 1:
        from torch import distributed

        lists: list[list[str]] = [[] for _ in range(world_size())]
        distributed.all_gather_object(lists, ids)
        ids = [id_ for some in lists for id_ in some]
    return list(dict.fromkeys(ids))


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The main process holds the folder, so that no two commands write one file."""
    if not is_main_process():
        yield
        return
    lock = FileLock(str(folder / ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            "another process writes benchmark results there",
            where=str(folder),
            fix="wait for it, or name another --out",
        ) from None
    try:
        yield
    finally:
        lock.release()
