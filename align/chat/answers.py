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
from pydantic import ValidationError

from align.config import ModelSettings, Server, ServerSettings
from align.engines.base import SampleRequest, SampleResult, SamplingSettings
from align.engines.local import LocalEngine
from align.engines.open import open_engine, open_servers
from align.engines.server.engine import ServerEngine
from align.engines.streaming import Stopped
from align.errors import UserError
from align.media.images import ImageStore
from align.media.video import frame_sampler_of, read_frames

# A person waits: what a run would sit out is reported soon.
IMPATIENT: dict[str, Any] = {"max_attempts": 4, "cooldown_s": 2.0}
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
    """A checkpoint to talk to, loaded here or behind the URL of a server. Only one conversation is answered at a time;
    others wait.

    `api_key_env`: the environment variable with the server's key. `model`: the name under which it is served, or None.

    Raises UserError where the checkpoint cannot be opened, or the server does not answer or has it not.
    """

    def __init__(self, checkpoint: str, *, api_key_env: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.model: str | None = None
        self._busy = threading.Lock()
        if is_url(checkpoint):
            servers = [_server(checkpoint, api_key_env)]
            served = open_servers(servers, None, ServerSettings(**IMPATIENT), open_image=_as_it_is)
            self.engine: LocalEngine | ServerEngine = served
            self.model = served.fleet.endpoints[0].model
        else:
            self.engine = open_engine(checkpoint, ModelSettings(), open_image=_as_it_is)

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
            if isinstance(self.engine, LocalEngine):
                return read_frames(file, sampler=frame_sampler_of(self.engine.prompter.processor))
            return read_frames(file)
        return [ImageStore(file.parent).open(file.name)]


def is_url(checkpoint: str) -> bool:
    """Whether a checkpoint is named by the address of a server that has it."""
    return checkpoint.startswith(("http://", "https://"))


def _server(url: str, api_key_env: str | None) -> Server:
    """The server at an address, with the name of a model behind a `#` where it serves several.

    >>> _server("http://gpu1:8000#policy-2", None).model
    'policy-2'
    """
    address, _, model = url.partition("#")
    try:
        return Server(url=address, model=model or None, api_key_env=api_key_env)
    except ValidationError:
        raise UserError("no address of a server", where=url, fix="name it as http://host:port") from None


def _as_it_is(picture: Image) -> Image:
    return picture


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


def short_name(checkpoint: str) -> str:
    """The end of a path, enough to tell a run's checkpoints apart.

    >>> short_name("/data/runs/critic/round-3/checkpoint"), short_name("./Valley-Eagle-7B/")
    ('critic/round-3', 'Valley-Eagle-7B')
    """
    parts = Path(checkpoint).resolve().parts
    return "/".join(parts[-3:-1]) if parts[-1] == "checkpoint" else parts[-1]
