"""A checkpoint and a conversation with pictures in, its next answers out while they are written.

The terminal (`align.chat.terminal`) and the page (`align.chat.web`) both talk through this. Pictures are checked as
those of a run are, by `align.media.images`, and opened once.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from PIL.Image import Image

from align.config import ModelSettings
from align.engines.base import SampleRequest, SampleResult, SamplingSettings
from align.engines.open import open_engine
from align.engines.streaming import Stopped
from align.media.images import ImageStore
from align.media.video import frame_sampler_of, read_frames

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm")


@dataclass(frozen=True)
class Exchange:
    """What a person asked, the pictures shown with it (a video as its frames), and the answer;
    None while there is none.

    `files` are what the pictures were opened from.
    """

    question: str
    pictures: tuple[Image, ...] = ()
    files: tuple[Path, ...] = ()
    answer: str | None = None

    def answered(self, answer: str | None) -> Exchange:
        """The same exchange with another answer."""
        return replace(self, answer=answer)


@dataclass(frozen=True)
class Answers:
    """The texts of K answers so far; when all have ended, also whether each was cut at the longest length allowed."""

    texts: tuple[str, ...]
    cut: tuple[bool, ...] | None = None


class Chat:
    """A loaded checkpoint to talk to. Only one conversation is answered at a time; others wait.

    Raises UserError where the checkpoint cannot be opened.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self.engine = open_engine(checkpoint, ModelSettings(), open_image=lambda picture: picture)
        self._busy = threading.Lock()

    def ask(self, question: str, files: Sequence[Path] = ()) -> Exchange:
        """A question about these image and video files; UserError for one that is missing, damaged or too large."""
        pictures = [picture for file in files for picture in self._open(file)]
        return Exchange(question, tuple(pictures), tuple(files))

    def answer(
        self, exchanges: Sequence[Exchange], settings: SamplingSettings, *, num_answers: int = 1, seed: int = 0
    ) -> Generator[Answers]:
        """Yield `num_answers` answers to the last exchange as they grow; the last thing yielded is whole.

        The question is encoded once, and all answers grow behind it. Closing the iterator stops them.

        Raises:
            UserError: the model refuses the conversation, or it is too long.
        """
        queue: SimpleQueue[Answers | BaseException] = SimpleQueue()
        stop = threading.Event()
        request = SampleRequest("chat", messages_of(exchanges), pictures_of(exchanges), num_answers, seed)

        def tell(texts: tuple[str, ...]) -> None:
            if stop.is_set():
                raise Stopped
            queue.put(Answers(texts))

        def work() -> None:
            try:
                with self._busy:
                    queue.put(_whole(self.engine.stream(request, settings, tell)))
            except BaseException as error:
                queue.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from _until_whole(queue)
        finally:
            stop.set()
            worker.join()

    def _open(self, file: Path) -> list[Image]:
        if file.suffix.lower() in VIDEO_SUFFIXES:
            return read_frames(file, sampler=frame_sampler_of(self.engine.prompter.processor))
        return [ImageStore(file.parent).open(file.name)]


def messages_of(exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    """The chat messages of a conversation, pictures as bare parts in front of the question they were shown with.

    >>> messages_of([Exchange("Hello", answer="Hi."), Exchange("And?")])[1]
    {'role': 'assistant', 'content': [{'type': 'text', 'text': 'Hi.'}]}
    """
    messages: list[dict[str, Any]] = []
    for exchange in exchanges:
        text = {"type": "text", "text": exchange.question}
        messages.append({"role": "user", "content": [*({"type": "image"} for _ in exchange.pictures), text]})
        if exchange.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": exchange.answer}]})
    return messages


def pictures_of(exchanges: Sequence[Exchange]) -> tuple[Image, ...]:
    """All pictures of a conversation, in the order of its messages."""
    return tuple(picture for exchange in exchanges for picture in exchange.pictures)


def _whole(result: SampleResult) -> Answers:
    return Answers(result.texts, tuple(reason == "length" for reason in result.finish_reasons))


def _until_whole(queue: SimpleQueue[Answers | BaseException]) -> Iterator[Answers]:
    """What comes from the queue up to the whole answers; what piled up meanwhile is skipped. Faults are raised here."""
    while True:
        found = queue.get()
        while isinstance(found, Answers) and found.cut is None and not queue.empty():
            found = queue.get()
        if isinstance(found, BaseException):
            raise found
        yield found
        if found.cut is not None:
            return
