"""Questions in, those whose images and videos are there out; the others are heard of, one by one, and left out."""

from __future__ import annotations

from collections.abc import Callable

from align.media.images import ImageStore
from align.models.record_faults import CANNOT_READ, UnusableRecord, record_faults
from align.records import Question


def readable_questions(
    questions: list[Question], images: ImageStore, on_unusable: Callable[[str, UnusableRecord], None]
) -> list[Question]:
    """The questions whose images have readable headers and whose videos were picked; of every other one the id and why.

    A picture that is damaged further in is found when it is decoded.
    """
    from align.media.video import frame_references, uniform

    found = []
    for question in questions:
        try:
            with record_faults(f"question {question.id}", CANNOT_READ):
                if question.video is not None:
                    question = question.with_frames(frame_references(images, question.video, uniform))
                for reference in question.images:
                    images.header(reference)
            found.append(question)
        except UnusableRecord as fault:
            on_unusable(question.id, fault)
    return found
