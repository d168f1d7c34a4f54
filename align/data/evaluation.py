"""A file of evaluation questions in; the fingerprints of their images, with the question each belongs to, out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align.data.entry import BadRow
from align.data.fingerprint import Fingerprints, stack
from align.data.pictures import Picture, PictureStore
from align.errors import UserError
from align.media.images import ImageStore
from align.records import read_questions


@dataclass(frozen=True)
class EvaluationImages:
    """Each different image once: the question that it was first seen with, its path, and all fingerprints in order."""

    questions: list[str]
    pictures: list[Picture]
    images: ImageStore

    @property
    def prints(self) -> Fingerprints:
        """The fingerprints of all pictures, in order."""
        return stack([picture.print for picture in self.pictures])


def evaluation_images(path: Path, image_root: Path | None) -> EvaluationImages:
    """The images of a questions file; `image_root` defaults to its folder.

    Raises:
        UserError: the file is no questions file, or one of its images cannot be read.
    """
    root = image_root or path.parent
    store = PictureStore(root, root, min_side=1)
    found = EvaluationImages([], [], ImageStore(root))
    seen: set[str] = set()
    for question in read_questions(path):
        for reference in question.images:
            if reference in seen:
                continue
            seen.add(reference)
            try:
                picture = store.take(reference)
            except BadRow as problem:
                raise UserError(
                    f"question {question.id!r}: {problem}", where=str(path), fix="name the folder of its images"
                ) from None
            found.questions.append(question.id)
            found.pictures.append(picture)
    if not found.pictures:
        raise UserError("no question has an image", where=str(path))
    return found
