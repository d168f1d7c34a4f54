"""Tables of rows with their readers in; questions.jsonl or pairs.jsonl with their images out,
and the counts of all of it.

A row that cannot be used is reported with file and line and left out; the rest is used. `import.json` beside the result
keeps the counts, the first of the faults, and what became of every column.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from align.data.counts import ImportCounts
from align.data.duplicates import Duplicates
from align.data.entry import BadRow, Entry, Preference, without_tags
from align.data.fingerprint import Fingerprints, near_pairs, stack
from align.data.formats import Reader
from align.data.json_rows import Row
from align.data.pictures import Picture, PictureStore
from align.data.sources import Table
from align.errors import UserError
from align.log import log
from align.monitoring.progress import LINE_EVERY_S
from align.records import IMAGE_TAG, MAX_DEPTH, Pair, Question, explain, to_line

DUPLICATE, NEAR_EVALUATION = "duplicate", "near to an evaluation image"


@dataclass(frozen=True)
class ConvertSettings:
    """What to make and what to leave out.

    make: `questions` or `pairs`. limit: draw at most so many rows, by `seed`. evaluation: fingerprints of images that
    nothing may come near.
    """

    make: str
    limit: int | None = None
    seed: int = 0
    evaluation: Fingerprints | None = None


def convert(tables: Sequence[tuple[Table, Reader]], store: PictureStore, settings: ConvertSettings) -> ImportCounts:
    """Write `store.out`/questions.jsonl or pairs.jsonl, and import.json. Rows are read once,
    and once before for a limit.

    Raises:
        UserError: nothing is left, or some images are files and others bytes and they are not to be copied.
    """
    counts = ImportCounts(settings.make, {table.name: reader.name for table, reader in tables})
    conversion = _Conversion(store, settings, counts)
    store.out.mkdir(parents=True, exist_ok=True)
    target = store.out / f"{settings.make}.jsonl"
    temporary = target.with_name(f".{target.name}.tmp")
    reported = time.monotonic()
    with temporary.open("w", encoding="utf-8") as file:
        for table, reader, row, copies in _taken(tables, settings):
            file.writelines(conversion.lines(row, copies, table, reader))
            if time.monotonic() - reported > LINE_EVERY_S:
                reported = time.monotonic()
                log.info("%d rows read, %d %s written", counts.rows, counts.written, settings.make)
    _check(counts, store)
    counts.treated = store.treated
    temporary.replace(target)
    counts.write(store.out / "import.json")
    return counts


class _Conversion:
    """What one import remembers from row to row: ids, texts with their pictures, and the counts."""

    def __init__(self, store: PictureStore, settings: ConvertSettings, counts: ImportCounts) -> None:
        self._store, self._settings, self._counts = store, settings, counts
        self._duplicates = Duplicates()
        self._ids: Counter[str] = Counter()

    def lines(self, row: Row, copies: int, table: Table, reader: Reader) -> list[str]:
        """The lines that a row becomes, so many times over; none where it is left out, which is counted."""
        self._counts.rows += copies
        try:
            if isinstance(row.data, BadRow):
                raise row.data
            records = self._records(row.where, row.data, copies, table, reader)
            lines = [to_line(record) + "\n" for record in records]
        except BadRow as problem:
            self._counts.drop(row.where, problem, copies)
            return []
        except RecursionError:
            self._counts.drop(row.where, BadRow("nested too deep"), copies)
            return []
        self._counts.written += len(lines)
        self._counts.without_image += sum(
            not record.images and not getattr(record, "video", None) for record in records
        )
        return lines

    def _records(
        self, where: str, data: dict[str, Any], copies: int, table: Table, reader: Reader
    ) -> Sequence[Question | Pair]:
        entry, columns = reader.read(data)
        make = self._settings.make
        if make == "pairs" and not entry.preferences:
            raise BadRow("no chosen and rejected answer")
        if make == "pairs" and entry.video is not None:
            raise BadRow("about a video", "pairs hold images alone; --as questions takes it")
        _check_tags(entry)
        pictures = tuple(self._store.take(image, table.root) for image in entry.images)
        question = _question(entry, pictures, self._store, table.meta)
        pairs = [_pair(question, entry, preference) for preference in entry.preferences] if make == "pairs" else []
        if self._duplicates.seen(_texts(entry, make), pictures):
            raise BadRow(DUPLICATE, "the same text about nearly the same image stood before")
        _refuse_near(pictures, self._settings)
        self._counts.note_columns(columns)
        found: list[Question | Pair] = []
        for _ in range(copies):
            own = (entry.question_id if make == "questions" else None) or entry.id
            name = _free(own or _place_name(where), self._ids)
            if make == "questions":
                found.append(question.model_copy(update={"id": name}))
            for place, pair in enumerate(pairs):
                changes = {
                    "id": name if len(pairs) == 1 else f"{name}/{place}",
                    "question_id": entry.question_id or name,
                }
                found.append(pair.model_copy(update=changes))
        return found


def _taken(
    tables: Sequence[tuple[Table, Reader]], settings: ConvertSettings
) -> Iterator[tuple[Table, Reader, Row, int]]:
    """Every row that is to be converted, and how many times over: as often as it counts, or was drawn for a limit."""
    chosen = _drawn(tables, settings) if settings.limit is not None else None
    first = 0
    for table, reader in tables:
        for row, repeat in table.counted_rows():
            copies = repeat if chosen is None else sum(first + copy in chosen for copy in range(repeat))
            first += repeat
            if copies:
                yield table, reader, row, copies


def _drawn(tables: Sequence[tuple[Table, Reader]], settings: ConvertSettings) -> set[int]:
    """The numbers of the rows to take: those with the smallest hashes,
    so that a row's fate does not hang on others'."""

    def hashed(number: int) -> bytes:
        return hashlib.sha256(f"{settings.seed}:{number}".encode()).digest()

    total = sum(copies for table, _ in tables for _, copies in table.counted_rows())
    assert settings.limit is not None
    return set(heapq.nsmallest(settings.limit, range(total), key=hashed))


def _check(counts: ImportCounts, store: PictureStore) -> None:
    if not counts.written:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.dropped.most_common(5))
        raise UserError(
            f"no {counts.make} came of {counts.rows} rows, read as {' and '.join(set(counts.formats.values()))}: "
            f"{reasons or 'the source is empty'}",
            where=str(store.root),
            fix="save it as UTF-8" if "not UTF-8 text" in counts.dropped else "check --format and --image-root",
        )
    if store.stayed and store.written:
        raise UserError(
            f"{store.stayed} images are files in {store.root} and {store.written} came as bytes",
            where=str(store.out),
            fix="run it again with --copy-images, so that all lie in one folder",
        )


def _check_tags(entry: Entry) -> None:
    texts = [turn.content for turn in entry.history if turn.role == "user"] + [entry.question]
    tags = sum(text.count(IMAGE_TAG) for text in texts)
    if tags not in (0, len(entry.images)):
        raise BadRow("image tags and images differ", f"the text names {tags} images, the row has {len(entry.images)}")


def _plain(value: Any, depth: int = 1) -> Any:
    """A value of `meta` as JSON can hold it: NaN is a missing value; what is no JSON stays as its text."""
    if depth >= MAX_DEPTH:
        raise BadRow("nested too deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _place_name(where: str) -> str:
    return where.rpartition("/")[2].replace(", entry ", "-").replace(", row ", "-").replace(":", "-")


def _question(entry: Entry, pictures: Sequence[Picture], store: PictureStore, meta: Mapping[str, Any]) -> Question:
    """The question without its id, which is found last, so that a row that is left out takes none."""
    try:
        return Question(
            id="new",
            question=entry.question,
            images=[picture.reference for picture in pictures],
            video=store.take_video(entry.video) if entry.video is not None else None,
            answer=entry.answer,
            answer_kind=entry.answer_kind,
            absent_objects=list(entry.absent_objects),
            system=entry.system,
            history=list(entry.history),
            meta=_plain({**entry.meta, **meta}),
        )
    except ValidationError as error:
        raise BadRow(explain(error, Question)) from None


def _free(name: str, ids: Counter[str]) -> str:
    """The name itself, or with the first number behind it that makes an id which nobody has."""
    ids[name] += 1
    while ids[name] > 1 and f"{name}#{ids[name]}" in ids:
        ids[name] += 1
    found = name if ids[name] == 1 else f"{name}#{ids[name]}"
    ids.setdefault(found, 1)
    return found


def _pair(question: Question, entry: Entry, preference: Preference) -> Pair:
    """The pair without its ids."""

    def message(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    try:
        return Pair(
            id="new",
            images=question.images,
            prompt=question.messages(),
            chosen=message(preference.chosen),
            rejected=message(preference.rejected),
            margin=preference.margin,
            rewards=dict(preference.rewards),
            responses=dict(preference.responses),
            meta=question.meta,
        )
    except ValidationError as error:
        raise BadRow(explain(error, Pair)) from None


def _texts(entry: Entry, make: str) -> list[str]:
    texts = [entry.system or "", entry.video or "", *(turn.content for turn in entry.history), entry.question]
    if make == "pairs":
        texts += [text for preference in entry.preferences for text in (preference.chosen, preference.rejected)]
    return [without_tags(text) for text in texts]


def _refuse_near(pictures: Sequence[Picture], settings: ConvertSettings) -> None:
    if settings.evaluation is None or not pictures:
        return
    ours = stack([picture.print for picture in pictures])
    near = next(near_pairs(ours, settings.evaluation), None)
    if near is not None:
        raise BadRow(NEAR_EVALUATION, f"{pictures[near[0]].reference} differs by {near[2]} bits of 128")
