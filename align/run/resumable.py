"""Records in as they are finished, a JSON Lines file in order out;
what was finished before a kill is not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.errors import UserError
from align.log import log
from align.records import Question, RecordT, parse_line, sealed, to_line, write_jsonl


class PartialFile:
    """An append-only JSONL file of records in the order they finish, beside the file it will become.

    Each process appends to a part of its own; `merge` puts all parts in the wanted order and writes the final file at
    once; `finish` also removes the parts. A torn last line (the process was killed while writing) is cut off and its
    record done again, and so is that of a line whose checksum does not fit.
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
            damaged = 0
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                for number, line in enumerate(file, start=1):
                    try:
                        record = parse_line(line, self.kind, f"{path}:{number}")
                    except UserError as error:
                        damaged += 1
                        log.warning("%s", error)
                        continue
                    records[record.id] = record  # type: ignore[attr-defined]
            if damaged:
                log.warning("%d finished records are damaged: they are done again", damaged)
        return records

    def keep(self, wanted: Callable[[Any], bool]) -> int:
        """Drop the finished records that are not `wanted`; how many those were. Call it before anybody appends."""
        records = self.read()
        kept = [record for record in records.values() if wanted(record)]
        if len(kept) < len(records):
            # One part takes all; written first: killed in between, a record is there twice, and never gone.
            first, *others = self._parts()
            write_jsonl(first, kept)
            for path in others:
                path.unlink()
        return len(records) - len(kept)

    def reopen(self) -> None:
        """Make the final file a part again: what it holds is finished, and compared with what is to be done."""
        lines = self.final.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(sealed(line.strip()) + "\n" for line in lines if line.strip())
        temporary.replace(self.path)
        self.final.unlink()

    def append(self, record: BaseModel) -> None:
        """Add a record and hand it to the operating system, so that a killed process loses nothing it finished."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(sealed(to_line(record)) + "\n")

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
        """Remove the parts."""
        for path in self._parts():
            path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.final.parent.glob(f"{self.final.stem}.part-*{self.final.suffix}"))


def drop_changed(partial: PartialFile, questions: Iterable[Question], changed: Iterable[str]) -> set[str]:
    """Drop finished records of questions that are not asked like this any more, or that show `changed` images.

    Returns the ids of what was dropped.
    """
    now, other = {question.id: question for question in questions}, set(changed)
    dropped: set[str] = set()

    def is_same(record: Any) -> bool:
        same = _is_asked(record.question, now.get(record.id)) and other.isdisjoint(record.question.images)
        if not same:
            dropped.add(record.id)
        return same

    partial.keep(is_same)
    return dropped


def _is_asked(question: Question, now: Question | None) -> bool:
    """Whether a question is asked like this now; as text where they differ, since NaN equals nothing."""
    return now is not None and (question == now or to_line(question) == to_line(now))


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
