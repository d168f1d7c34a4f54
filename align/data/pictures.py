"""Images as they stand in rows in; paths inside an image root out, verified, measured and fingerprinted.

Paths stay where they are (or are copied where that is asked for); bytes and data URIs become files named by their content.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.data.entry import BadRow
from align.data.fingerprint import fingerprint
from align.media.images import MAX_IMAGE_PIXELS, in_short, is_file

UNREADABLE = "image cannot be read"
TOO_SMALL = "image too small"
OUTSIDE = "image outside the image root"


@dataclass(frozen=True)
class Picture:
    """An image of the data set: its path inside the image root, size in pixels, and fingerprint."""

    reference: str
    size: tuple[int, int]
    print: tuple[np.ndarray, np.ndarray]


@dataclass
class PictureStore:
    """Takes in the images of a source.

    `root` is the folder that paths count from; `out` is where images that come as bytes are written (under `images/`).
    """

    root: Path
    out: Path
    min_side: int
    copy: bool = False
    stayed: int = 0
    written: int = 0
    _known: dict[str, Picture | BadRow] = field(default_factory=dict)

    def take(self, image: Any, root: str | None = None) -> Picture:
        """The picture of an image from a row; raises BadRow where it cannot be read or is too small."""
        if isinstance(image, dict):
            image = image["bytes"] if image.get("bytes") else image.get("path")
        if isinstance(image, str) and image.startswith("data:"):
            image = _decode_uri(image)
        if isinstance(image, bytes):
            return self._remember(hashlib.sha256(image).hexdigest(), lambda: self._from_bytes(image))
        if not isinstance(image, str) or not image:
            raise BadRow(UNREADABLE, f"expected a path or bytes, found {type(image).__name__}")
        path = Path(root or self.root) / image
        return self._remember(str(path), lambda: self._from_path(path))

    def _remember(self, key: str, make: Any) -> Picture:
        if key not in self._known:
            try:
                self._known[key] = make()
            except BadRow as problem:
                self._known[key] = problem
        found = self._known[key]
        if isinstance(found, BadRow):
            raise found
        return found

    def _from_path(self, path: Path) -> Picture:
        if not is_file(path):
            raise BadRow(UNREADABLE, f"there is no file {in_short(str(path))}")
        size, print_ = self._look(path, str(path))
        if self.copy:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            reference = f"images/{digest[:20]}{path.suffix.lower()}"
            self._place(reference, lambda target: _link_or_copy(path, target))
            return Picture(reference, size, print_)
        inside = path.resolve()
        if not inside.is_relative_to(self.root.resolve()):
            raise BadRow(OUTSIDE, f"{path} is not in {self.root}")
        self.stayed += 1
        return Picture(str(inside.relative_to(self.root.resolve())), size, print_)

    def _from_bytes(self, data: bytes) -> Picture:
        source = io.BytesIO(data)
        size, print_ = self._look(source, f"{len(data)} bytes")
        ending = (Image.open(io.BytesIO(data)).format or "png").lower().replace("jpeg", "jpg")
        reference = f"images/{hashlib.sha256(data).hexdigest()[:20]}.{ending}"
        self._place(reference, lambda target: target.write_bytes(data))
        self.written += 1
        return Picture(reference, size, print_)

    def _place(self, reference: str, write: Any) -> None:
        target = self.out / reference
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            write(temporary)
            temporary.replace(target)

    def _look(self, source: Any, name: str) -> tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        """Size and fingerprint; the whole image is decoded, so that a truncated one is found."""
        try:
            with Image.open(source) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise BadRow(UNREADABLE, f"{name}: {width}x{height} pixels are too many")
                if min(width, height) < self.min_side:
                    raise BadRow(TOO_SMALL, f"{name}: {width}x{height} pixels, the shorter side needs {self.min_side}")
                # A JPEG may be decoded at an eighth of its size; its data are read to the end all the same.
                image.draft("RGB", (64, 64))
                return (width, height), fingerprint(image)
        except BadRow:
            raise
        except Exception as error:  # what a broken file makes one of many decoders raise
            raise BadRow(UNREADABLE, f"{name}: {error}") from None


def _decode_uri(uri: str) -> bytes:
    header, _, body = uri.partition(",")
    if not header.endswith(";base64"):
        raise BadRow(UNREADABLE, f"a data URI that is not base64 ({header[:40]})")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(UNREADABLE, f"a data URI with bad base64 ({error})") from None


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
