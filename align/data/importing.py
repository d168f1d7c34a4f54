"""What `align data` does: a source, a format's name and a person's wishes in; a converted data set and its counts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from align.data.convert import Converted, ConvertSettings, convert
from align.data.entry import BadRow
from align.data.evaluation import evaluation_images
from align.data.formats import Format, find_format
from align.data.pictures import PictureStore
from align.data.rows import Row, source_folder
from align.errors import UserError


@dataclass(frozen=True)
class ImportWishes:
    """How a source is read and what is kept of it.

    make: `questions`, `pairs`, or None for what the format usually makes. against: evaluation questions (JSONL) whose
    images nothing may come near, `against_root` their folder. min_side: least shorter side of an image in pixels.
    """

    format: str = "plain"
    make: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    image_root: Path | None = None
    copy_images: bool = False
    split: str = "train"
    subset: str | None = None
    limit: int | None = None
    seed: int = 0
    min_side: int = 28
    against: Path | None = None
    against_root: Path | None = None


@dataclass(frozen=True)
class Imported:
    """The file that was written, the folder its images count from, and the counts."""

    path: Path
    image_root: Path
    counts: Converted


def import_data(source: str, out: Path, wishes: ImportWishes) -> Imported:
    """Convert `source` into `out`.

    Raises:
        UserError: the source or the format is unknown, or nothing is left of it.
    """
    format_ = find_format(wishes.format, wishes.columns)
    if wishes.image_root is not None and not wishes.image_root.is_dir():
        raise UserError("no such folder", where=str(wishes.image_root), fix="name the folder of the images")

    def rows() -> Iterator[Row]:
        return format_.rows(source, split=wishes.split, subset=wishes.subset)

    root = wishes.image_root or source_folder(source)
    store = PictureStore(root, out, wishes.min_side, copy=wishes.copy_images)
    evaluation = None
    if wishes.against is not None:
        evaluation = evaluation_images(wishes.against, wishes.against_root).prints
    settings = ConvertSettings(
        make=wishes.make or format_.makes or _made_of_first(format_, rows),
        limit=wishes.limit,
        seed=wishes.seed,
        evaluation=evaluation,
    )
    counts = convert(rows, format_, store, settings)
    return Imported(out / f"{settings.make}.jsonl", root if store.stayed else out, counts)


def parse_columns(text: str | None) -> dict[str, str]:
    """`question=prompt,images=picture` as a dictionary; raises UserError where a part is no name=column.

    >>> parse_columns("question=prompt, images=picture")
    {'question': 'prompt', 'images': 'picture'}
    """
    columns = {}
    for part in (text or "").split(","):
        if part.strip():
            name, separator, column = part.partition("=")
            if not separator or not column.strip():
                raise UserError(f"--columns expects name=column, found {part!r}", fix="for example question=prompt")
            columns[name.strip()] = column.strip()
    return columns


def _made_of_first(format_: Format, rows: Callable[[], Iterator[Row]]) -> str:
    """Pairs where the first readable row has a preference, else questions."""
    for row in rows():
        if isinstance(row.data, BadRow):
            continue
        try:
            return "pairs" if format_.read(row.data).preferences else "questions"
        except BadRow:
            continue
    return "questions"
