"""A round's images by their contents: what a stage has seen, the next stage must see too.

Samples of one picture, judged and trained on with another of the same name, would be wrong without a word. The first
stage that looks at an image notes the hash of its file in the round's folder; every later stage holds its images
against that. Hashing costs what reading costs: 1.7 s for 10,000 files of 100 kB from memory, on one core.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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

    Call it on one process. Raises UserError where a file has other contents than noted, or cannot be read.
    """
    noted = _read(noted_in)
    found = images.file_hashes(reference for record in seen for reference in record.images)
    changed = [name for name, digest in found.items() if noted.get(name, digest) != digest]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"the image {changed[0]!r}{others} is not the one that was used so far",
            where=str(noted_in),
            fix=f"put it back as it was, or {otherwise}",
        )
    if found.keys() - noted.keys():
        write_text(noted_in, json.dumps(noted | found, indent=0, ensure_ascii=False) + "\n")


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
