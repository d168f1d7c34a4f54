"""A source in a public format in; questions.jsonl or pairs.jsonl with their images out, and a count of what was left out.

Malformed rows are reported with file and line and left out; the rest goes on. `import.json` beside the result keeps the
counts and the first of the faults.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from align.data.duplicates import Duplicates
from align.data.entry import BadRow, Entry, without_tags
from align.data.fingerprint import Fingerprints, near_pairs, stack
from align.data.formats import Format
from align.data.pictures import Picture, PictureStore
from align.data.rows import Row
from align.errors import UserError
from align.log import log
from align.monitoring.progress import LINE_EVERY_S
from align.records import Pair, Question, Record, explain, to_line

SHOWN = 20
KEPT_FAULTS = 1000
MALFORMED, DUPLICATE, NEAR_EVALUATION = "malformed row", "duplicate", "near to an evaluation image"


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


@dataclass
class Converted:
    """Counts of a conversion, and the places of what was left out with the reason (the first `KEPT_FAULTS`)."""

    rows: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    malformed: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def drop(self, where: str, reason: str, detail: str) -> None:
        self.dropped[reason] += 1
        # Half a character is told as it is escaped: no log and no file could hold it.
        where, detail = (text.encode("utf-8", "backslashreplace").decode() for text in (where, detail))
        if self.dropped.total() <= SHOWN:
            log.warning("%s: left out: %s", where, detail)
        if len(self.faults) < KEPT_FAULTS:
            self.faults.append(f"{where}: {detail}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "written": self.written,
            "dropped": dict(self.dropped),
            "malformed": dict(self.malformed),
            "faults": self.faults,
        }


def convert(
    rows: Callable[[], Iterator[Row]], format_: Format, store: PictureStore, settings: ConvertSettings
) -> Converted:
    """Write `store.out`/questions.jsonl or pairs.jsonl. `rows` is called once, and once before for a limit.

    Raises:
        UserError: nothing is left, or some images are files and others bytes and they are not to be copied.
    """
    found = Converted()
    chosen = _drawn(rows, settings) if settings.limit is not None else None
    duplicates = Duplicates()
    ids: Counter[str] = Counter()
    store.out.mkdir(parents=True, exist_ok=True)
    target = store.out / f"{settings.make}.jsonl"
    temporary = target.with_name(f".{target.name}.tmp")
    spoken = time.monotonic()
    with temporary.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows()):
            if chosen is not None and number not in chosen:
                continue
            found.rows += 1
            if time.monotonic() - spoken > LINE_EVERY_S:
                spoken = time.monotonic()
                log.info("%d rows read, %d %s written", found.rows, found.written, settings.make)
            try:
                records = _records(row, format_, store, settings, duplicates, ids)
            except BadRow as problem:
                _drop(found, row.where, problem)
                continue
            for record in records:
                file.write(to_line(record) + "\n")
                found.written += 1
    _check(found, store, settings)
    temporary.replace(target)
    # Faults are escaped already; a reason may name a column that holds half a character.
    counts = json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n"
    (store.out / "import.json").write_text(counts, encoding="utf-8", errors="backslashreplace")
    if found.dropped.total() > SHOWN:
        log.warning("and %d more, see %s", found.dropped.total() - SHOWN, store.out / "import.json")
    return found


FILTERS = (DUPLICATE, NEAR_EVALUATION, "image cannot be read", "image too small", "image outside the image root")


def _drop(found: Converted, where: str, problem: BadRow) -> None:
    if problem.reason in FILTERS:
        found.drop(where, problem.reason, str(problem))
        return
    found.malformed[problem.reason] += 1
    found.drop(where, MALFORMED, str(problem))


def _drawn(rows: Callable[[], Iterator[Row]], settings: ConvertSettings) -> set[int]:
    """The numbers of the rows to take: those with the smallest hashes, so that a row's fate does not hang on others'."""

    def hashed(number: int) -> bytes:
        return hashlib.sha256(f"{settings.seed}:{number}".encode()).digest()

    total = sum(1 for _ in rows())
    assert settings.limit is not None
    return set(heapq.nsmallest(settings.limit, range(total), key=hashed))


def _check(found: Converted, store: PictureStore, settings: ConvertSettings) -> None:
    if not found.written:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in (found.malformed + found.dropped).most_common(5))
        raise UserError(
            f"no {settings.make} came of {found.rows} rows: {reasons or 'the source is empty'}",
            where=str(store.root),
            fix="check --format and --image-root",
        )
    if store.stayed and store.written:
        raise UserError(
            f"{store.stayed} images are files in {store.root} and {store.written} came as bytes",
            where=str(store.out),
            fix="run it again with --copy-images, so that all lie in one folder",
        )


def _records(
    row: Row,
    format_: Format,
    store: PictureStore,
    settings: ConvertSettings,
    duplicates: Duplicates,
    ids: Counter[str],
) -> Sequence[Record]:
    """What one row becomes; raises BadRow where it is left out."""
    if isinstance(row.data, BadRow):
        raise row.data
    entry = format_.read(row.data)
    if settings.make == "pairs" and not entry.preferences:
        raise BadRow("no chosen and rejected answer")
    pictures = tuple(store.take(image, entry.image_root) for image in entry.images)
    question = _question(entry, pictures, row.where, ids)
    if duplicates.seen(_texts(entry, settings.make), pictures):
        raise BadRow(DUPLICATE, "the same text about nearly the same image stood before")
    _refuse_near(pictures, settings)
    if settings.make == "questions":
        return [question]
    return [_pair(question, entry, index) for index in range(len(entry.preferences))]


def _question(entry: Entry, pictures: Sequence[Picture], where: str, ids: Counter[str]) -> Question:
    name = entry.id or where.rpartition("/")[2].replace(", entry ", "-").replace(", row ", "-").replace(":", "-")
    try:
        question = Question(
            id=name,
            question=entry.question,
            images=[picture.reference for picture in pictures],
            answer=entry.answer,
            history=list(entry.history),
            meta=entry.meta,
        )
    except ValidationError as error:
        raise BadRow(explain(error, Question)) from None
    return question.model_copy(update={"id": _free(name, ids)})


def _free(name: str, ids: Counter[str]) -> str:
    """The name itself, or with the first number behind it that makes an id which nobody has."""
    ids[name] += 1
    while ids[name] > 1 and f"{name}#{ids[name]}" in ids:
        ids[name] += 1
    found = name if ids[name] == 1 else f"{name}#{ids[name]}"
    ids.setdefault(found, 1)
    return found


def _pair(question: Question, entry: Entry, index: int) -> Pair:
    preference = entry.preferences[index]

    def message(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    try:
        return Pair(
            id=question.id if len(entry.preferences) == 1 else f"{question.id}/{index}",
            images=question.images,
            prompt=question.messages(),
            chosen=message(preference.chosen),
            rejected=message(preference.rejected),
            margin=preference.margin,
            question_id=question.id,
            meta=question.meta,
        )
    except ValidationError as error:
        raise BadRow(explain(error, Pair)) from None


def _texts(entry: Entry, make: str) -> list[str]:
    texts = [turn.content for turn in entry.history] + [entry.question]
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
