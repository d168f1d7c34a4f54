"""A stage that answers question by question: shared by all processes of a launch, kept when interrupted,
written in order.

Each process takes every n-th unfinished question and appends what it finishes to a part of its own; when all are done,
the main process merges the parts in question order. So two processes leave the same file as one. The parts stay until
the stage is complete: one that is interrupted later on finds everything finished. What cannot be worked on (`LeftOut`)
stands in a file of its own beside the answers, and is tried again when the stage is resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from align.distributed.ranks import barrier, is_main_process, rank, world_size
from align.errors import UserError
from align.log import log
from align.monitoring.cost import save_cost
from align.monitoring.progress import progress
from align.records import LeftOut, read_jsonl
from align.run.manifest import Manifest
from align.run.resumable import PartialFile


class WithId(Protocol):
    @property
    def id(self) -> str:
        """The id that finished items are known by."""


ItemT = TypeVar("ItemT", bound=WithId)
ThingT = TypeVar("ThingT")
OnRecord = Callable[[Any], None]
# So many left out with nothing else in between: a disk that is gone, not some bad records.
MAX_LEFT_OUT_IN_A_ROW = 40


@dataclass(frozen=True)
class StageOutput:
    """All records in question order, what the engine had to say, and which questions were left out."""

    records: list[Any]
    notes: dict[str, str]
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, Any]:
        """For the manifest: how many questions were left out, by reason; nothing where none was."""
        found = Counter(line.reason for line in self.left_out)
        return {"left_out": dict(found)} if found else {}


def begin(
    manifest: Manifest,
    stage: str,
    *,
    settings: dict[str, Any],
    inputs: dict[str, str],
    image_root: Path | None = None,
    by_record: Collection[str] = (),
) -> bool:
    """Enter a stage on the main process, and tell every process whether there is something to do.

    `by_record`: see `Manifest.begin`.
    """
    if is_main_process():
        manifest.begin(stage, settings=settings, inputs=inputs, image_root=image_root, by_record=by_record)
    barrier()
    something_to_do = not manifest.complete(stage)
    barrier()  # nobody finishes the stage before everybody has looked
    return something_to_do


def left_out_file(final: Path) -> Path:
    """Where the questions stand that a stage has left out, beside its file."""
    return final.with_name(f"{final.stem}.left-out{final.suffix}")


def map_resumable(
    final: Path,
    kind: type[BaseModel],
    items: Sequence[ItemT],
    work: Callable[[list[ItemT], OnRecord], dict[str, str]],
    *,
    label: str,
) -> StageOutput:
    """Let `work` answer every unfinished item of this process, calling its second argument with each finished record.

    That may be a `LeftOut` instead of a record of `kind`: the item is counted and has no record.

    Raises:
        UserError: every item was left out, or MAX_LEFT_OUT_IN_A_ROW one after the other.
    """
    partial, left_out = PartialFile(final, kind, rank()), PartialFile(left_out_file(final), LeftOut, rank())
    if is_main_process():
        left_out.discard()
    finished = partial.read()
    barrier()  # nobody appends before everybody has read
    todo = [item for item in items if item.id not in finished]
    notes: dict[str, str] = {}
    mine = todo[rank() :: world_size()]
    in_a_row = 0
    with progress(label, total=len(items), done=len(finished), weight=world_size(), parts=final.stem) as advance:

        def on_record(record: BaseModel) -> None:
            nonlocal in_a_row
            (left_out if isinstance(record, LeftOut) else partial).append(record)
            advance(1)
            in_a_row = in_a_row + 1 if isinstance(record, LeftOut) else 0
            if isinstance(record, LeftOut):
                _say(record, in_a_row)

        if mine:
            notes = work(mine, on_record)
        barrier()  # what is said at the end holds for everybody
    records = _merge(partial, left_out, items) if is_main_process() else []
    barrier()
    absent = read_jsonl(left_out.final, LeftOut) if left_out.final.is_file() else []
    if items and len(absent) == len(items):
        raise UserError(f"all {len(items)} questions are left out; the first: {absent[0].message}", where=str(final))
    return StageOutput(records or read_jsonl(final, kind), notes, absent)


def _say(record: LeftOut, in_a_row: int) -> None:
    log.warning("left out: %s", record.message)
    if in_a_row >= MAX_LEFT_OUT_IN_A_ROW:
        raise UserError(
            f"nothing but questions that cannot be used, {in_a_row} of them one after the other; "
            f"the last: {record.message}",
            fix="correct what it names and run the same command again: what was finished is kept",
        )


def _merge(partial: PartialFile, left_out: PartialFile, items: Sequence[ItemT]) -> list[Any]:
    absent = left_out.read()
    records = partial.merge(item.id for item in items if item.id not in absent)
    left_out.final.unlink(missing_ok=True)
    if absent:
        left_out.finish(item.id for item in items if item.id in absent)
    return records


def batches(things: Sequence[ThingT], size: int) -> Iterator[list[ThingT]]:
    """
    >>> list(batches([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for start in range(0, len(things), size):
        yield list(things[start : start + size])


def finish(
    manifest: Manifest,
    stage: str,
    *,
    outputs: Iterable[Path],
    counts: dict[str, Any],
    notes: dict[str, str],
    **facts: Any,
) -> None:
    """Mark the stage complete, on the main process, and let no process continue before it is."""
    save_cost()
    barrier()
    if is_main_process():
        outputs = list(outputs)
        manifest.finish(stage, outputs=outputs, counts=counts, notes=notes, **facts)
        for path in outputs:
            PartialFile(path, BaseModel).discard()
    barrier()
