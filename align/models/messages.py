"""Chat messages with images and videos in; messages of plain text with marks where they stand,
and what stands there, out.

A place is an image (video) part or `<image>` (`<video>`) written in the text. Marks in front of a message's text, and
marks of what has no place, which go in front of the first user turn, are joined by a space and set off by a line break.
"""

import re
from collections.abc import Sequence
from typing import Any

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
MARKS = {"image": IMAGE_MARK, "video": VIDEO_MARK}
PART_KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
SOURCE_KEYS = ("image", "video", "path", "url", "image_url", "video_url")


def place(
    messages: Sequence[dict], given: dict[str, list[Any]], blank: Any = None
) -> tuple[list[dict], dict[str, list[Any]]]:
    """Messages whose contents are strings, and for "image" and "video" what stands at the marks, in order.

    `given`: images and videos for the places that have none of their own; without places they go in front. A place that
    nothing is given for is None. `blank`: an image for a conversation without any. `<video>` is a mark only where there
    are videos. Raises ValueError where places and what is given differ in number.

    >>> messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which is larger?"}]}]
    >>> place(messages, {"image": ["a.png"], "video": []})
    ([{'role': 'user', 'content': '<image>\\nWhich is larger?'}], {'image': ['a.png'], 'video': []})
    """
    num_parts, num_marks = _count_places(messages, has_videos=bool(given["video"]))
    unplaced = {kind: list(sources) for kind, sources in given.items()}
    found: dict[str, list[Any]] = {kind: [] for kind in MARKS}
    written = {kind for kind, count in num_marks.items() if count}
    rendered = []
    for message in messages:
        parts = parts_of(message)
        for part in parts:
            kind = PART_KINDS.get(part["type"])
            if kind is not None:
                source, rest = source_of(part), unplaced[kind]
                found[kind].append(rest.pop(0) if source is None and rest else source)
        rendered.append({**message, "content": _join(parts, written)})
    for kind in written:
        if not num_parts[kind]:
            found[kind], unplaced[kind] = unplaced[kind], []
    if blank is not None and not any([*found.values(), *unplaced.values(), written]):
        unplaced["image"] = [blank]
    _put_in_front(rendered, found, unplaced)
    return rendered, found


def spread_videos(text: str, images: Sequence[Any], videos: Sequence[Sequence[Any]]) -> tuple[str, list[Any]]:
    """A text in which frames stand for videos, joined by a space as images in front of a text are, and all its images.

    Raises ValueError where the text names more or fewer than are given.

    >>> spread_videos("<video> and <image>", ["a.png"], [["1.png", "2.png"]])
    ('<image> <image> and <image>', ['1.png', '2.png', 'a.png'])
    """
    queues = {IMAGE_MARK: list(images), VIDEO_MARK: list(videos)}
    pieces, spread = [], []
    for piece in re.split(f"({IMAGE_MARK}|{VIDEO_MARK})", text):
        if piece in queues:
            if not queues[piece]:
                raise ValueError(f"the text names more of {piece} than are given")
            given = queues[piece].pop(0)
            frames = list(given) if piece == VIDEO_MARK else [given]
            spread += frames
            piece = " ".join([IMAGE_MARK] * len(frames))
        pieces.append(piece)
    if any(queues.values()):
        raise ValueError("found more images or videos than the text names")
    return "".join(pieces), spread


def parts_of(message: dict) -> list[dict]:
    """A message's content as a list of parts, those of type "text" with a text.

    Keys without a value are left out: a column of `datasets` gives every part the keys of all others. Raises ValueError
    for a part that is neither text nor to be looked at.

    >>> parts_of({"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]})
    [{'type': 'image'}, {'type': 'text', 'text': 'Why?'}]
    """
    content = message.get("content") or ""
    given = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    parts = [{key: value for key, value in part.items() if value is not None} for part in given]
    for part in parts:
        if part.get("type") == "text":
            part.setdefault("text", "")
        elif part.get("type") not in PART_KINDS:
            raise ValueError(f"expected parts of type 'text', 'image' or 'video', found {part.get('type')!r}")
    return parts


def _count_places(messages: Sequence[dict], *, has_videos: bool) -> tuple[dict[str, int], dict[str, int]]:
    """How many parts and how many written marks there are of each kind."""
    parts = [part for message in messages for part in parts_of(message)]
    num_parts = {kind: sum(PART_KINDS.get(part["type"]) == kind for part in parts) for kind in MARKS}
    num_marks = {kind: sum(part.get("text", "").count(mark) for part in parts) for kind, mark in MARKS.items()}
    if not num_parts["video"] and not has_videos:
        num_marks["video"] = 0
    for kind, mark in MARKS.items():
        if num_marks[kind] and num_parts[kind] and num_marks[kind] != num_parts[kind]:
            raise ValueError(
                f"expected the texts to name all {num_parts[kind]} {kind}s of the conversation as {mark} or none, "
                f"found {num_marks[kind]}"
            )
    return num_parts, num_marks


def _put_in_front(messages: list[dict], found: dict[str, list[Any]], unplaced: dict[str, list[Any]]) -> None:
    """Marks for what has no place, in front of the first user turn."""
    if not any(unplaced.values()):
        return
    first = next((message for message in messages if message["role"] == "user"), None)
    for kind, rest in unplaced.items():
        if rest and (first is None or found[kind]):
            reason = "there is no user turn to put them in" if first is None else "the conversation has fewer places"
            raise ValueError(f"found {len(rest)} {kind}s too many: {reason}")
    assert first is not None
    marks = [MARKS[kind] for kind, rest in unplaced.items() for _ in rest]
    first["content"] = " ".join(marks) + "\n" + first["content"]
    for kind, rest in unplaced.items():
        found[kind] = found[kind] or rest


def source_of(part: dict) -> Any:
    """The image or video of a part, under any of the names in use; None where it has none."""
    for key in SOURCE_KEYS:
        source = part.get(key)
        if source is not None:
            return source["url"] if isinstance(source, dict) and "url" in source else source
    return None


def _join(parts: list[dict], written: set[str]) -> str:
    """One string of a message's parts; marks in front of the first text are set off from it.

    Kinds in `written` are marked in the texts themselves.
    """
    text, leading = "", []
    for part in parts:
        kind = PART_KINDS.get(part["type"])
        if kind is None:
            text += part["text"]
        elif kind not in written and text:
            text += MARKS[kind]
        elif kind not in written:
            leading.append(MARKS[kind])
    return " ".join(leading) + "\n" + text if leading else text
