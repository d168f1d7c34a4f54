"""Images as they stand in rows in; paths inside an image root out, verified, measured and fingerprinted.

Paths stay where they are (or are copied where that is asked for);
bytes and data URIs become files named by their content.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.data.entry import BadRow
from align.data.fingerprint import fingerprint
from align.data.urls import UrlCache
from align.errors import UserError
from align.media.decoding import Header, read_picture
from align.media.images import in_short

UNREADABLE = "image cannot be read"
TOO_SMALL = "image too small"
OUTSIDE = "image outside the image root"
IS_URL = "image is a URL"
# First bytes of the pictures that tables hold as base64 without saying so: PNG, JPEG, GIF, WebP, BMP.
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """An image of the data set: its path inside the image root, size in pixels, and fingerprint."""

    reference: str
    size: tuple[int, int]
    print: tuple[np.ndarray, np.ndarray]


@dataclass
class PictureStore:
    """Takes in the images of a source.

    `root` is the folder that paths count from and must not leave; `out` is where images that come as bytes are written
    (under `images/`); `urls` fetches those that are URLs, None refuses them.
    """

    root: Path
    out: Path
    min_side: int
    copy: bool = False
    stayed: int = 0
    written: int = 0
    # How many pictures were turned upright, scaled to 8 bits, laid on white.
    treated: Counter[str] = field(default_factory=Counter)
    urls: UrlCache | None = None
    _known: dict[str, Picture | BadRow] = field(default_factory=dict)
    _failed: dict[str, BadRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._real_root = self.root.resolve()

    def take(self, image: Any, root: Path | None = None) -> Picture:
        """The picture of an image from a row, its path counted from `root`.

        Raises:
            BadRow: it cannot be read, is too small, lies outside the image root, or is a URL and `urls` is None.
        """
        if isinstance(image, dict):
            image = image["bytes"] if image.get("bytes") else image.get("path") or image.get("url")
        if isinstance(image, str):
            image = self._resolved(image)
        if isinstance(image, bytes):
            data = image
            return self._remember(hashlib.sha256(data).hexdigest(), lambda: self._from_bytes(data))
        if not isinstance(image, str) or not image:
            raise BadRow(UNREADABLE, f"expected a path or bytes, found {type(image).__name__}")
        path = Path(root or self.root) / image
        return self._remember(str(path), lambda: self._from_path(path))

    def take_video(self, video: str) -> str:
        """The path of a video file, or of a folder of frames, inside the image root; BadRow where it is not there.

        Frames are not decoded here. With `copy` the file or folder is linked or copied below `out`.
        """
        path = self.root / video.removeprefix("file://")
        inside = self._inside(path)
        if self.copy:
            reference = f"videos/{hashlib.sha256(str(inside).encode()).hexdigest()[:20]}{inside.suffix.lower()}"
            self._place(reference, lambda target: _link_or_copy(inside, target))
            return reference
        self.stayed += 1
        return str(inside.relative_to(self._real_root))

    def _resolved(self, image: str) -> str | bytes:
        """The bytes of a data URI, of bare base64 or behind a URL; a path as it is."""
        if image.startswith("data:"):
            return _decode_uri(image)
        if image.startswith("file://"):
            return image.removeprefix("file://")
        if image.startswith(("http://", "https://")):
            if self.urls is None:
                raise BadRow(IS_URL, f"{in_short(image)}; --allow-urls fetches it")
            return self._remember_bytes(image)
        if "://" in image:
            raise BadRow(IS_URL, f"{in_short(image)} cannot be fetched")
        return _decode_bare(image) or image

    def _remember_bytes(self, url: str) -> bytes:
        """What is behind a URL; one that failed is not tried again."""
        assert self.urls is not None
        if problem := self._failed.get(url):
            raise problem
        try:
            return self.urls.fetch(url)
        except BadRow as problem:
            self._failed[url] = problem
            raise

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
        inside = self._inside(path)
        header, print_ = self._look(path, str(path))
        if self.copy:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            reference = f"images/{digest[:20]}{path.suffix.lower()}"
            self._place(reference, lambda target: _link_or_copy(path, target))
            return Picture(reference, header.size, print_)
        self.stayed += 1
        return Picture(str(inside.relative_to(self._real_root)), header.size, print_)

    def _inside(self, path: Path) -> Path:
        """The real path of what is inside the image root; nothing else is opened, also where it is to be copied."""
        try:
            there = path.exists()
            inside = path.resolve()
        except (OSError, ValueError, RuntimeError):
            there = False  # too long for a path, with a NUL in it, or a link to itself
        if not there:
            raise BadRow(UNREADABLE, f"there is no file {in_short(str(path))}")
        if not inside.is_relative_to(self._real_root):
            raise BadRow(OUTSIDE, f"{in_short(str(path))} is not in {self.root}; --image-root names a folder above it")
        return inside

    def _from_bytes(self, data: bytes) -> Picture:
        source = io.BytesIO(data)
        header, print_ = self._look(source, f"{len(data)} bytes")
        ending = header.format.lower().replace("jpeg", "jpg").replace("mpo", "jpg")
        reference = f"images/{hashlib.sha256(data).hexdigest()[:20]}.{ending}"
        self._place(reference, lambda target: target.write_bytes(data))
        self.written += 1
        return Picture(reference, header.size, print_)

    def _place(self, reference: str, write: Any) -> None:
        target = self.out / reference
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            write(temporary)
            temporary.replace(target)

    def _look(self, source: Any, name: str) -> tuple[Header, tuple[np.ndarray, np.ndarray]]:
        """Header and fingerprint; the whole image is decoded, so that a truncated one is found."""
        try:
            # A JPEG may be decoded at an eighth of its size; its data are read to the end all the same.
            header, small = read_picture(source, name, draft_px=64)
        except UserError as error:
            raise BadRow(UNREADABLE, error.message) from None
        width, height = header.size
        if min(width, height) < self.min_side:
            raise BadRow(TOO_SMALL, f"{name}: {width}x{height} pixels, the shorter side needs {self.min_side}")
        self.treated.update(header.treatments)
        return header, fingerprint(small)


def _decode_uri(uri: str) -> bytes:
    header, _, body = uri.partition(",")
    if not header.endswith(";base64"):
        raise BadRow(UNREADABLE, f"a data URI that is not base64 ({header[:40]})")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(UNREADABLE, f"a data URI with bad base64 ({error})") from None


def _decode_bare(text: str) -> bytes | None:
    """The picture in base64 without a head, as VLMEvalKit's tables hold it; None where it is none."""
    if len(text) < 64 or not _BASE64.fullmatch(text):
        return None
    try:
        data = base64.b64decode(text)
    except (binascii.Error, ValueError):
        return None
    return data if data.startswith(_MAGIC) else None


def _link_or_copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
