"""Held-out and training images of a run in, a warning where they share any out; images count by content,
whatever their name.

Training images are those of the rounds' questions, of which every round keeps the hashes (align.run.image_hashes).
"""

from __future__ import annotations

import json
from pathlib import Path

from align.errors import UserError
from align.media.images import ImageStore
from align.report.read import RunData
from align.report.warnings import RunWarning


def find_leaks(run: RunData, root: Path | None) -> list[RunWarning]:
    """A warning where held-out images, which lie in `root`, are also those of training questions; else nothing."""
    trained = {digest for data in run.trained for digest in _noted(data.folder.image_hashes, run.problems)}
    if not trained or root is None or not root.is_dir():
        return []
    references = {image for data in run.evaluated for line in data.lines for image in line.question.images}
    held_out = _contents(ImageStore(root), references)
    shared = sum(digest in trained for digest in held_out)
    if not shared:
        return []
    return [
        RunWarning(
            "Held-out images were trained on",
            f"{shared:,} of {len(held_out):,} held-out images also belong to training questions.",
            "The held-out numbers flatter the model.",
            serious=True,
        )
    ]


def _contents(images: ImageStore, references: set[str]) -> set[str]:
    """The different files that can be read, by their hashes; a picture that cannot be shown is reported beside it."""
    found: set[str] = set()
    for reference in references:
        try:
            found |= set(images.file_hashes([reference]).values())
        except (UserError, OSError):
            continue
    return found


def _noted(path: Path, problems: list[str]) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [str(digest) for digest in json.loads(path.read_text(encoding="utf-8")).values()]
    except (OSError, ValueError, AttributeError) as error:
        problems.append(f"{path.parent.name}/{path.name}: cannot be read ({error})")
        return []
