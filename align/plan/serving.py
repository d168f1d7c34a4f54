"""The questions of a run in, what a server of its policy or critic needs out: images per prompt, tokens of room."""

from __future__ import annotations

from typing import Any

from align.config import Config
from align.media.images import ImageStore
from align.models.load import load_processor
from align.plan.prompt_sizes import PromptMeter
from align.sources import read_all_questions


def needs_of_server(
    config: Config, checkpoint: str, processor: dict[str, Any], *, critic: bool
) -> tuple[int | None, int | None]:
    """The most images of a question, and the tokens of the longest prompt with its response; None where not known.

    Videos are left out: their frames are picked when they are asked about.
    What a critic reads depends on the responses.
    """
    if config.questions is None:
        return None, None
    questions = [question for question in read_all_questions(config) if question.video is None]
    max_images = max((len(question.images) for question in questions), default=0)
    if critic:
        return max_images, None
    images = ImageStore(config.question_images, config.max_image_pixels)
    meter = PromptMeter(load_processor(checkpoint, **processor), images)
    sizes = [meter.size(question.id, question.messages(), question.images).tokens for question in questions]
    return max_images, max(sizes, default=0) + config.sample.max_new_tokens
