"""Questions about videos in, the same questions about their picked frames out;
questions about images stay as they are."""

from __future__ import annotations

from align.config import Config
from align.errors import UserError
from align.media.images import ImageStore
from align.records import Question


def pick_frames(
    questions: list[Question],
    images: ImageStore,
    config: Config,
    checkpoint: str,
    *,
    served: bool,
    leave_unreadable: bool = False,
) -> list[Question]:
    """Every video becomes the frames that the policy's family looks at, as references to images.

    `served`: the policy is behind a server, so its processor is not here: `model.video_frames` (or 8) evenly then.
    `leave_unreadable`: a question whose video cannot be read stays as it is, for the stage to leave out.

    Raises:
        UserError: a video cannot be read; all of them are named.
    """
    if not any(question.video for question in questions):
        return questions
    from align.media.video import frame_references, frame_sampler_of

    processor = None
    if not served and config.model.video_frames is None:
        from align.models.load import load_processor

        processor = load_processor(checkpoint, **config.model.processor)
    sampler = frame_sampler_of(processor, config.model.video_frames)
    picked, problems = [], []
    for question in questions:
        if question.video is None:
            picked.append(question)
            continue
        try:
            picked.append(question.with_frames(frame_references(images, question.video, sampler)))
        except UserError as error:
            picked.append(question)
            problems.append(f"  - question {question.id!r}: {error}")
    if problems and not leave_unreadable:
        raise UserError(f"{len(problems)} videos cannot be used:\n" + "\n".join(problems[:20]))
    return picked
