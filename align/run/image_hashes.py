"""A round's images by their contents: what a stage has seen, the next stage must see too.

Samples of one picture, judged and trained on with another of the same name, would be wrong without a word. The first
stage that looks at an image notes the hash of its file in the round's folder; every later stage holds its images
against that. Hashing costs what reading costs: 1.7 s for 10,000 files of 100 kB from memory, on one core.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from align.errors import UserError
from align.files import write_text
from align.media.images import ImageStore
from align.records import Pair, Question

ROUND_ANEW = "restart the round: run its first stage with --redo"


def record_or_verify_images(
    noted_in: Path, images: ImageStore, seen: Iterable[Question | Pair], *, otherwise: str = ROUND_ANEW
) -> None:
    """Note the contents of images that are new to the file `noted_in`, hold those of all others against it.

    Images that cannot be read any more are passed over: the stage counts what it leaves out for want of them. Call it
    on one process. Raises UserError where a file is another image than noted.
    """
    seen = list(seen)
    changed = changed_images(noted_in, images, seen)
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"the image {changed[0]!r}{others} is not the one that was used so far",
            where=str(noted_in),
            fix=f"put it back as it was, or {otherwise}",
        )
    record_images(noted_in, images, seen)


def changed_images(noted_in: Path, images: ImageStore, seen: Iterable[Question | Pair]) -> list[str]:
    """References to images that can be read and are not those that were noted."""
    return [reference for reference in _other_files(noted_in, images, seen) if _opens(images, reference)]


def unreadable_images(noted_in: Path, images: ImageStore, seen: Iterable[Question | Pair]) -> set[str]:
    """References to images that were noted and have since been damaged; one that is gone is no such file."""
    return {reference for reference in _other_files(noted_in, images, seen) if not _opens(images, reference)}


def _other_files(noted_in: Path, images: ImageStore, seen: Iterable[Question | Pair]) -> list[str]:
    noted = _read(noted_in)
    found = []
    for reference in dict.fromkeys(reference for record in seen for reference in record.images):
        now = _hash_of(images, reference)
        if noted.keys() & now.keys() and not now.items() <= noted.items():
            found.append(reference)
    return found


def record_images(noted_in: Path, images: ImageStore, seen: Iterable[Question | Pair], *, anew: bool = False) -> None:
    """Note the contents of images that are new to the file, and with `anew` of those that it has otherwise."""
    noted = _read(noted_in)
    found: dict[str, str] = {}
    for reference in dict.fromkeys(reference for record in seen for reference in record.images):
        found |= _hash_of(images, reference)
    now = noted | found if anew else found | noted
    if now != noted:
        write_text(noted_in, json.dumps(now, indent=0, ensure_ascii=False) + "\n")


def forget_left_out(noted_in: Path, images: ImageStore, questions: Iterable[Question], absent: Collection[str]) -> None:
    """Take out what was noted of images that only questions with these ids show: nothing was made of them.

    They may be replaced then.
    """
    noted = _read(noted_in)
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for question in questions:
        names[question.id in absent].update(images.name(reference) for reference in question.images)
    unused = names[True] - names[False]
    if unused & noted.keys():
        left = {name: digest for name, digest in noted.items() if name not in unused}
        write_text(noted_in, json.dumps(left, indent=0, ensure_ascii=False) + "\n")


def _hash_of(images: ImageStore, reference: str) -> dict[str, str]:
    """The hash of an image's file by its name; nothing where there is no such file."""
    try:
        return images.file_hashes([reference])
    except (UserError, OSError):
        return {}


def _opens(images: ImageStore, reference: str) -> bool:
    try:
        images.open(reference)
    except UserError:
        return False
    return True


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(noted, dict) and all(isinstance(digest, str) for digest in noted.values()):
            return noted
        problem = "expected names and hashes"
    except (ValueError, RecursionError) as error:
        problem = str(error).splitlines()[0]
    raise UserError(
        f"the record of images is damaged ({problem})",
        where=str(path),
        fix="restore it from a copy; or remove it, if you know that no image has changed since the stage began",
    )
