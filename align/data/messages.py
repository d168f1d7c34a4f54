"""Dialogues as data sets write them in; system prompt, earlier turns, question, images and answer out.

Turns are ``{"from", "value"}`` (ShareGPT, LLaVA) or ``{"role", "content"}`` (OpenAI, TRL, ms-swift); content is text or
a list of parts. Images stand as `<image>` in the text, as parts with or without the image itself, or as
`<img>path</img>`. Turns of tools are not taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from align.data.entry import BadRow
from align.data.fields import is_missing, unpacked
from align.records import IMAGE_TAG, Turn

ROLES: dict[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
}
_IMAGE = re.compile(rf"{IMAGE_TAG}|<img>\s*(.*?)\s*</img>", re.DOTALL)


@dataclass(frozen=True)
class Tags:
    """How the turns of one source are written, where it says so (`tags` in LLaMA-Factory's dataset_info.json)."""

    role: str = "from"
    content: str = "value"
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)


@dataclass(frozen=True)
class Message:
    """One turn. `images` are those of its `<image>` tags in order;
    None stands for the next of the row's image column."""

    role: str
    text: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """A dialogue around its last question; `images` as in `Message`, of all user turns."""

    system: str | None
    history: list[Turn]
    question: str
    images: list[Any]
    answer: str | None

    def all_images(self, column: Callable[[], Sequence[Any]]) -> list[Any]:
        """The images in order; `column` is asked where some stand only as a tag, or where none is named at all.

        Raises:
            BadRow: there are not as many images as tags.
        """
        if self.images and None not in self.images:
            return self.images
        given = list(column())
        if not self.images:
            return given
        wanted = self.images.count(None)
        if wanted != len(given):
            raise BadRow("image tags and images differ", f"the text names {wanted} images, the row has {len(given)}")
        rest = iter(given)
        return [next(rest) if image is None else image for image in self.images]


def messages_of(value: Any, name: str, tags: Tags | None = None) -> list[Message]:
    """The messages of a column: a list of turns, one turn, a dict of lists (as `datasets` stores them), or plain text.

    Raises:
        BadRow: it is none of that, or a turn has no speaker or no text.

    >>> messages_of([{"from": "human", "value": "<img>a.png</img>What?"}], "conversations")
    [Message(role='user', text='<image>What?', images=('a.png',))]
    """
    value = unpacked(value)
    if isinstance(value, str):
        return [_message("user", value, name)]
    turns = list(_turns(value, name))
    if not turns:
        raise BadRow(f"{name} is no list of turns")
    return [message for turn in turns for message in _messages_of_turn(turn, name, tags)]


def unread_keys(value: Any, tags: Tags | None = None) -> list[str]:
    """What turns hold beside speaker and text, each key once; none for what is no turn.

    >>> unread_keys([{"role": "assistant", "content": "A kitten.", "reasoning_content": "It has fur."}])
    ['reasoning_content']
    """
    value = unpacked(value)
    speakers = {tags.role} if tags else {"from", "role"}
    known = speakers | ({tags.content} if tags else {"value", "content"})
    turns = [turn for turn in (value if isinstance(value, list) else [value]) if isinstance(turn, dict)]
    found = (
        key for turn in turns if speakers & turn.keys() for key in turn.keys() - known if not is_missing(turn[key])
    )
    return sorted({str(key) for key in found})


def response_of(value: Any, name: str, tags: Tags | None = None) -> tuple[list[Message], str]:
    """A response with the messages that stand before it in the same column: text, one turn, or a list of turns.

    Raises:
        BadRow: it does not end with exactly one turn of the assistant.
    """
    value = unpacked(value)
    if isinstance(value, str):
        return [], value
    messages = messages_of(value, name, tags)
    last = messages[-1]
    if last.role != "assistant" or (len(messages) > 1 and messages[-2].role == "assistant"):
        raise BadRow(f"{name} does not end with one response")
    if not last.text.strip():
        raise BadRow(f"{name} is empty")
    return messages[:-1], last.text


def dialogue_of(messages: Sequence[Message]) -> Dialogue:
    """The dialogue around its last question.

    Raises:
        BadRow: nobody asks anything, a system turn stands behind others, or several answers follow the question.
    """
    first = next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
    system = "\n".join(message.text for message in messages[:first]) or None
    messages = messages[first:]
    turns = _as_turns(messages)
    asked = [place for place, message in enumerate(turns) if message.role == "user"]
    if not asked:
        raise BadRow("nobody asks anything")
    last = asked[-1]
    if len(turns) > last + 2:
        raise BadRow("several answers to one question")
    return Dialogue(
        system,
        turns[:last],
        turns[last].content,
        [image for message in messages for image in message.images],
        turns[last + 1].content if last + 1 < len(turns) else None,
    )


def history_of(value: Any, name: str = "history") -> list[Turn]:
    """Earlier turns that stand in a column of their own: messages, or [question, answer] as Alpaca has them.

    Raises:
        BadRow: it is neither, or a turn brings an image of its own.
    """
    value = unpacked(value)
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        if not all(isinstance(text, str) for pair in value for text in pair):
            raise BadRow(f"{name} is no list of [question, answer]", repr(value)[:80])
        value = [{"human": question, "gpt": answer} for question, answer in value]
    messages = messages_of(value, name)
    if any(image is not None for message in messages for image in message.images):
        raise BadRow(f"an image inside {name}")
    return _as_turns(messages)


def _as_turns(messages: Sequence[Message]) -> list[Turn]:
    if any(message.role == "system" for message in messages):
        raise BadRow("a system turn stands in the middle")
    return [Turn(role=cast(Literal["user", "assistant"], turn.role), content=turn.text) for turn in messages]


def _turns(value: Any, name: str) -> Iterable[Any]:
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        if len({len(cells) for cells in value.values()}) != 1:
            raise BadRow(f"{name} has columns of different lengths")
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise BadRow(f"{name} is no list of turns", f"found {type(value).__name__}")
    return value


def _messages_of_turn(turn: Any, name: str, tags: Tags | None) -> list[Message]:
    if not isinstance(turn, dict):
        raise BadRow(f"a turn of {name} has no speaker or no text", repr(turn)[:80])
    both = [(ROLES[key], turn[key]) for key in turn if key in ROLES and ROLES[key] != "system"]
    if len(both) == 2 and len(turn) == 2:  # {"human": ..., "assistant": ...}
        return [_message(role, content, name) for role, content in both]
    pairs = [(tags.role, tags.content)] if tags else [("from", "value"), ("role", "content")]
    speaker, content = next(((turn[a], turn.get(b)) for a, b in pairs if turn.get(a) is not None), (None, None))
    if speaker in ("tool", "function", "observation", "function_call", "tool_call", "tool_response"):
        raise BadRow("a turn of a tool")
    role = (tags.roles if tags else ROLES).get(speaker) if isinstance(speaker, str) else None
    if role is None or content is None:
        raise BadRow(f"a turn of {name} has no speaker or no text", repr(turn)[:80])
    return [_message(role, content, name)]


def _message(role: str, content: Any, name: str) -> Message:
    texts: list[str] = []
    images: list[Any] = []
    for part in content if isinstance(content, list) else [content]:
        text = _text_of(part, name)
        if text is None:
            images.append(_image_of(part, name))
            texts.append(IMAGE_TAG)
        elif role == "user":
            images += [found[1] or None for found in _IMAGE.finditer(text)]
            texts.append(_IMAGE.sub(IMAGE_TAG, text))
        else:
            texts.append(text)
    if images and role != "user":
        raise BadRow(f"an image in a turn of the {role}")
    return Message(role, "".join(texts), tuple(images))


def _text_of(part: Any, name: str) -> str | None:
    """The text of a part, None of an image. Null keys are those that `datasets` fills in."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRow(f"a part of {name} is no text and no image", repr(part)[:80])
    kind = part.get("type")
    if kind in ("image", "image_url", "input_image"):
        return None
    if kind in (None, "text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind is None:
        return None
    raise BadRow(f"a part of {name} is no text and no image", f"of type {kind!r}")


def _image_of(part: dict[str, Any], name: str) -> Any:
    """The image in a part; None where the part only marks its place.

    >>> _image_of({"type": "image_url", "image_url": {"url": "a.png"}, "text": None}, "messages")
    'a.png'
    """
    keys = ("image", "image_url", "url", "path", "base64", "bytes", "data", "source")
    image = next((part[key] for key in keys if not is_missing(part.get(key))), None)
    if image is None and part.get("type") is None:
        raise BadRow(f"a part of {name} is no text and no image", repr(part)[:80])
    if isinstance(image, dict):
        return next((image[key] for key in ("url", "data") if not is_missing(image.get(key))), image)
    return image
