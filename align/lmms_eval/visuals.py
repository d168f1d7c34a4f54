"""A document's visuals (or messages) as lmms-eval's tasks give them in, chat messages with opened pictures out.

Pictures are PIL images or image files; videos become the frames that the model's family looks at. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from align.media.decoding import convert, read_picture
from align.media.images import ImageStore
from align.media.video import FrameSampler, read_frames
from align.records import IMAGE_TAG

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
AUDIO_SUFFIXES = {".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"}


class Unaskable(Exception):
    """A request that this toolkit cannot ask; the text counts it, `detail` names the case."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


@dataclass
class Dialogue:
    """Messages with bare image parts, and their pictures in order;
    `num_marks` of <image> were taken out of the text."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    num_marks: int = 0

    @property
    def note(self) -> str | None:
        """What was changed in the text, for the manifest."""
        return "<image> in the text was taken out" if self.num_marks else None

    @property
    def text(self) -> str:
        """All text, as one turn."""
        return "\n".join(
            "".join(part["text"] for part in message["content"] if part["type"] == "text") for message in self.messages
        )


def dialogue_of(looked: Any, prompt: str, gives_messages: bool, sampler: FrameSampler) -> Dialogue:
    """What a task shows of a document: its messages, or its visuals in front of the prompt.

    Where the prompt names every picture as <image>, they stand there; otherwise such marks are taken out, since they
    would ask for pictures that are not there.

    Raises:
        Unaskable: it holds sound, a piece of a video, an address, or something unknown.
        UserError, OSError, ValueError: a picture or a video cannot be read.
    """
    if not gives_messages:
        visuals = looked if isinstance(looked, (list, tuple)) else [] if looked is None else [looked]
        parts = [_part(visual) for visual in _flat(visuals)]
        looked = [{"role": "user", "content": _placed(prompt, parts)}]
    dialogue = Dialogue()
    for message in looked:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        dialogue.messages.append({"role": message["role"], "content": _bare(content, dialogue, sampler)})
    return dialogue


def _placed(prompt: str, visuals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pieces = prompt.split(IMAGE_TAG)
    if len(pieces) == 1 or len(pieces) - 1 != len(visuals):
        return [*visuals, {"type": "text", "text": prompt}]
    content = [{"type": "text", "text": pieces[0]}]
    for visual, piece in zip(visuals, pieces[1:], strict=True):
        content += [visual, {"type": "text", "text": piece}]
    return [part for part in content if part["type"] != "text" or part["text"].strip()]


def _bare(content: Sequence[dict[str, Any]], dialogue: Dialogue, sampler: FrameSampler) -> list[dict[str, Any]]:
    """The parts with their pictures taken out into the dialogue."""
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            dialogue.num_marks += part["text"].count(IMAGE_TAG)
            parts.append({"type": "text", "text": part["text"].replace(IMAGE_TAG, "")})
            continue
        pictures = _opened(part["type"], part.get("url", part.get(part["type"])), sampler)
        dialogue.images += pictures
        parts += [{"type": "image"}] * len(pictures)
    return parts


def _flat(visuals: Sequence[Any]) -> list[Any]:
    return [item for visual in visuals for item in (_flat(visual) if isinstance(visual, (list, tuple)) else [visual])]


def _part(visual: Any) -> dict[str, Any]:
    """A visual with its kind, which lmms-eval tells by type and by the file's name."""
    if isinstance(visual, dict) and "bytes" not in visual:
        if visual.get("video_start") is not None or visual.get("video_end") is not None:
            raise Unaskable("pieces of videos are not supported")
        if "array" in visual:
            raise Unaskable("sound is not supported")
        return {"type": visual.get("type", "video"), "url": visual.get("url") or visual.get("path")}
    if isinstance(visual, (str, Path)):
        suffix = Path(visual).suffix.lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else "video"
        return {"type": kind, "url": visual}
    return {"type": "image", "url": visual}


def _opened(kind: str, source: Any, sampler: FrameSampler) -> list[Image.Image]:
    if kind not in ("image", "video"):
        raise Unaskable("sound is not supported" if kind == "audio" else f"parts of type {kind} are not supported")
    if isinstance(source, (str, Path)):
        if "://" in str(source):
            raise Unaskable("addresses are not fetched", str(source)[:80])
        path = Path(source)
        return [ImageStore(path.parent).open(path.name)] if kind == "image" else read_frames(path, sampler=sampler)
    if isinstance(source, dict) and source.get("bytes"):
        return [read_picture(BytesIO(source["bytes"]), f"{len(source['bytes'])} bytes")[1]]
    if isinstance(source, Image.Image):
        return [convert(source)]
    raise Unaskable("visuals of this kind are not supported", f"{kind} as {type(source).__name__}")
