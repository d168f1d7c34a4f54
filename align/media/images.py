"""Image references in, verified PIL images out: inside the image root, readable, within the pixel limit.

A reference is a path, or a frame of a video file: `clips/dog.mp4#frame=12` (counted from 0),
or an image file that is a frame
of a video: `clips/dog/12.png#frame`. URLs are not fetched here; a reference that is one is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from align.config import Config
from align.errors import UserError
from align.files import file_sha256
from align.media.decoding import MAX_IMAGE_PIXELS, Header, convert, read_header, read_picture
from align.media.rgb import Conversion
from align.media.video_decoding import read_frame

_FRAME = re.compile(r"(?P<video>.+)#frame=(?P<index>\d+)")
FRAME_MARK = "#frame"
# Set in `info` of a picture that is an image file and a frame of a video: some models look at frames otherwise.
FRAME_FILE_KEY = "frame_file"
GREY = (127, 127, 127)


@dataclass(frozen=True)
class ImageStore:
    """Opens the images of a run.

    `root` is the folder that every image must lie in; `max_pixels` refuses decompression bombs by the size that the
    file's header claims, before a pixel is decoded. `conversion`: to RGB as people see pictures, or `plain`.
    """

    root: Path
    max_pixels: int = MAX_IMAGE_PIXELS
    conversion: Conversion = "displayed"

    def path(self, reference: str) -> Path:
        """The file of a reference (of a frame: its video); UserError when it is a URL, leaves the root,
        or is not there."""
        path = self._resolved(reference)
        if not is_file(path):
            raise UserError(
                f"there is no image {in_short(file_of(reference))!r} in {self.root.resolve()}",
                fix="check the path, or set image_root",
            )
        return path

    def name(self, reference: str) -> str:
        """The path of a reference's file inside the root, whether it is there or not; UserError as `path`."""
        return self._resolved(reference).relative_to(self.root.resolve()).as_posix()

    def _resolved(self, reference: str) -> Path:
        reference = file_of(reference)
        if "://" in reference or reference.startswith("data:"):
            raise UserError(
                f"the image {reference[:80]!r} is not a file",
                fix="download it and name it by its path inside the image root",
            )
        root = self.root.resolve()
        try:
            path = (root / reference).resolve()
        except (OSError, ValueError, RuntimeError):  # too long for a path, with a NUL in it, or a link to itself
            raise UserError(f"{in_short(repr(reference))} is not a path", fix="check the path of the image") from None
        if not path.is_relative_to(root):
            raise UserError(
                f"the image {in_short(reference)!r} lies outside the image root {root}",
                fix="move it, or set image_root",
            )
        return path

    def size(self, reference: str) -> tuple[int, int]:
        """(width, height) in pixels as the picture is shown, from the header alone."""
        return self.header(reference).size

    def header(self, reference: str) -> Header:
        """What the picture's header tells; a frame of a video file has to be decoded for it."""
        frame = _FRAME.fullmatch(reference)
        if frame:
            return Header(self._frame(reference, int(frame["index"])).size, "video frame")
        return read_header(
            self.path(reference), in_short(reference), max_pixels=self.max_pixels, conversion=self.conversion
        )

    def open(self, reference: str | Image.Image) -> Image.Image:
        """The image as RGB, fully decoded; the first frame of an animation. A picture in memory may come as well."""
        if isinstance(reference, Image.Image):
            return convert(reference, conversion=self.conversion)
        frame = _FRAME.fullmatch(reference)
        if frame:
            return self._frame(reference, int(frame["index"]))
        path, name = self.path(reference), in_short(reference)
        _, picture = read_picture(path, name, max_pixels=self.max_pixels, conversion=self.conversion)
        if self.is_frame(reference):
            picture.info[FRAME_FILE_KEY] = True
        return picture

    def blank(self, reference: str) -> Image.Image:
        """A grey picture of the same size that says nothing; of a frame, one that passes for a frame."""
        picture = Image.new("RGB", self.size(reference), GREY)
        if self.is_frame(reference):
            picture.info[FRAME_FILE_KEY] = True
        return picture

    @staticmethod
    def is_frame(reference: str) -> bool:
        """Whether a reference says that its picture is a frame of a video."""
        return reference.endswith(FRAME_MARK) or _FRAME.fullmatch(reference) is not None

    def file_hashes(self, references: Iterable[str]) -> dict[str, str]:
        """sha256 of every file that the references name, by its path inside the root; of a frame, of its video."""
        files = {self.path(reference) for reference in dict.fromkeys(references)}
        root = self.root.resolve()
        return {path.relative_to(root).as_posix(): _file_hash(path) for path in sorted(files)}

    def sha256(self, reference: str) -> str:
        """Of the file's bytes; of a frame, of its video's hash and its number."""
        frame = _FRAME.fullmatch(reference)
        digest = _file_hash(self.path(reference))
        return hashlib.sha256(f"{digest}#{frame['index']}".encode()).hexdigest() if frame else digest

    def _frame(self, reference: str, index: int) -> Image.Image:
        return read_frame(self.path(reference), index, max_pixels=self.max_pixels)


def question_images(config: Config) -> ImageStore:
    """The images of a run's questions, opened as `model.image_conversion` says."""
    return ImageStore(config.question_images, config.max_image_pixels, config.model.image_conversion)


def evaluation_images(config: Config) -> ImageStore:
    """The images of a run's held-out questions, opened as those of its questions."""
    return ImageStore(config.evaluation_images, config.max_image_pixels, config.model.image_conversion)


def treatment_counts(headers: Iterable[Header]) -> Counter[str]:
    """How many pictures were turned upright, scaled to 8 bits, laid on white."""
    return Counter(treatment for header in headers for treatment in header.treatments)


def file_of(reference: str) -> str:
    """The file's path in a reference, without the frame."""
    frame = _FRAME.fullmatch(reference)
    return frame["video"] if frame else reference.removesuffix(FRAME_MARK)


def is_file(path: Path) -> bool:
    """Whether there is such a file; no for a text that is too long to be a path, as an image in base64 is."""
    try:
        return path.is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def in_short(text: str) -> str:
    """A path as a message shows it, whatever was given for one."""
    return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"


def _file_hash(path: Path) -> str:
    """sha256 of a file; read once a process as long as nothing has touched it."""
    now = path.stat()
    return _hash_of(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@lru_cache(maxsize=1_000_000)
def _hash_of(path: Path, *file_and_age: int) -> str:
    return file_sha256(path)
