"""A stage that answers question by question: shared by all processes of a launch, kept when interrupted,
written in order.

Each process takes every n-th unfinished question and appends what it finishes to a part of its own; when all are done,
the main process merges the parts in question order. So two processes leave the same file as one. The parts stay until
the stage is complete: one that is interrupted later on finds everything finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from align.distributed.ranks import barrier, is_main_process, rank, world_size
from align.monitoring.cost import save_cost
from align.monitoring.progress import progress
from align.records import read_jsonl
from align.run.manifest import Manifest
from align.run.resumable import PartialFile


class WithId(Protocol):
    @property
    def id(self) -> str:
        """The id that finished items are known by."""


ItemT = TypeVar("ItemT", bound=WithId)
ThingT = TypeVar("ThingT")
OnRecord = Callable[[Any], None]


@dataclass(frozen=True)
class StageOutput:
    """All records in question order, and what the engine had to say."""

    records: list[Any]
    notes: dict[str, str]


def begin(
    manifest: Manifest,
    stage: str,
    *,
    settings: dict[str, Any],
    inputs: dict[str, str],
    image_root: Path | None = None,
) -> bool:
    """Enter a stage on the main process, and tell every process whether there is something to do."""
    if is_main_process():
        manifest.begin(stage, settings=settings, inputs=inputs, image_root=image_root)
    barrier()
    something_to_do = not manifest.complete(stage)
    barrier()  # nobody finishes the stage before everybody has looked
    return something_to_do


def map_resumable(
    final: Path,
    kind: type[BaseModel],
    items: Sequence[ItemT],
    work: Callable[[list[ItemT], OnRecord], dict[str, str]],
    *,
    label: str,
) -> StageOutput:
    """Let `work` answer every unfinished item of this process,
    calling its second argument with each finished record."""
    partial = PartialFile(final, kind, rank())
    finished = partial.read()
    barrier()  # nobody appends before everybody has read
    todo = [item for item in items if item.id not in finished]
    notes: dict[str, str] = {}
    mine = todo[rank() :: world_size()]
    with progress(label, total=len(items), done=len(finished), weight=world_size(), parts=final.stem) as advance:

        def on_record(record: BaseModel) -> None:
            partial.append(record)
            advance(1)

        if mine:
            notes = work(mine, on_record)
        barrier()  # what is said at the end holds for everybody
    records = partial.merge(item.id for item in items) if is_main_process() else []
    barrier()
    return StageOutput(records or read_jsonl(final, kind), notes)


def batches(things: Sequence[ThingT], size: int) -> Iterator[list[ThingT]]:
    """
    >>> list(batches([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for start in range(0, len(things), size):
        yield list(things[start : start + size])


def finish(
    manifest: Manifest, stage: str, *, outputs: Iterable[Path], counts: dict[str, Any], notes: dict[str, str]
) -> None:
    """Mark the stage complete, on the main process, and let no process continue before it is."""
    save_cost()
    barrier()
    if is_main_process():
        outputs = list(outputs)
        manifest.finish(stage, outputs=outputs, counts=counts, notes=notes)
        for path in outputs:
            PartialFile(path, BaseModel).discard()
    barrier()
