"""What `align data` does: a source and a person's options in; a converted data set and its counts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.data.convert import ConvertSettings, convert
from align.data.counts import ImportCounts
from align.data.entry import BadRow
from align.data.evaluation import evaluation_images
from align.data.formats import Reader, peek, reader_of
from align.data.pictures import PictureStore
from align.data.sources import Table, open_source, source_folder
from align.data.urls import UrlCache
from align.errors import UserError

URL_CACHE = "url-cache"


@dataclass(frozen=True)
class ImportOptions:
    """How a source is read and what is kept of it.

    format: a name of `align.data.formats.FORMATS`, None to recognise it by its shape. make: `questions`, `pairs`, or
    None for pairs where the rows have preferences. columns: of a plain table, by what they are. against: evaluation
    questions (JSONL) whose images nothing may come near, `against_root` their folder. min_side:
    least shorter side of an image in
    pixels. allow_urls: fetch images that are URLs.
    """

    format: str | None = None
    make: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    image_root: Path | None = None
    copy_images: bool = False
    allow_urls: bool = False
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
    counts: ImportCounts


def import_data(source: str, out: Path, options: ImportOptions) -> Imported:
    """Convert `source` into `out`.

    Raises:
        UserError: the source or the format is unknown, or nothing is left of it.
    """
    if options.image_root is not None and not options.image_root.is_dir():
        raise UserError("no such folder", where=str(options.image_root), fix="name the folder of the images")
    if options.make not in (None, "questions", "pairs"):
        raise UserError(f"--as is questions or pairs, found {options.make!r}")
    tables = [
        (table, reader_of(table, options.format, options.columns))
        for table in open_source(source, split=options.split, subset=options.subset)
    ]
    root = options.image_root or source_folder(source)
    urls = UrlCache(out / URL_CACHE) if options.allow_urls else None
    store = PictureStore(root, out, options.min_side, copy=options.copy_images, urls=urls)
    evaluation = None
    if options.against is not None:
        evaluation = evaluation_images(options.against, options.against_root).prints
    settings = ConvertSettings(options.make or _makes(tables), options.limit, options.seed, evaluation)
    counts = convert(tables, store, settings)
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


def _makes(tables: Sequence[tuple[Table, Reader]]) -> str:
    """Pairs where the first rows have preferences, else questions; UserError where the tables differ."""
    made = {table.name: kind for table, reader in tables if (kind := _makes_of(table, reader)) is not None}
    if len(set(made.values())) > 1:
        one = next(name for name, kind in made.items() if kind == "pairs")
        other = next(name for name, kind in made.items() if kind == "questions")
        raise UserError(f"{one} has preferences, {other} has none", fix="name one of the files, or use --as questions")
    return next(iter(made.values()), "questions")


def _makes_of(table: Table, reader: Reader) -> str | None:
    found = None
    for data in peek(table):
        try:
            entry, _ = reader.read(data)
        except (BadRow, RecursionError):
            continue
        if entry.preferences:
            return "pairs"
        found = "questions"
    return found
