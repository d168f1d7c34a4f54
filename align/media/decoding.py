"""A picture file in, its header or its RGB pixels out; whatever a decoder raises becomes a UserError.

Only the formats that data sets have are tried: every further decoder of Pillow is one more that a hostile file may
choose. Nothing is decoded before the size in the header has been held against the limit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from align.errors import UserError
from align.media.rgb import FORMATS, Conversion, displayed_size, rgb, treatments

MAX_IMAGE_PIXELS = 100_000_000


@dataclass(frozen=True)
class Header:
    """What a picture's header tells: (width, height) in pixels as it is shown, its format,
    and what `rgb` will do to it."""

    size: tuple[int, int]
    format: str
    treatments: tuple[str, ...] = ()


def read_header(
    source: Path | BinaryIO, name: str, *, max_pixels: int = MAX_IMAGE_PIXELS, conversion: Conversion = "displayed"
) -> Header:
    """The header of a picture; no pixel is decoded. `name` is what an error calls it.

    Raises UserError where it is no picture of `FORMATS`, damaged, or has more than `max_pixels`.
    """
    with _checked(source, name, max_pixels) as image:
        return _header(image, conversion)


def read_picture(
    source: Path | BinaryIO,
    name: str,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    conversion: Conversion = "displayed",
    draft_px: int | None = None,
) -> tuple[Header, Image.Image]:
    """Header and RGB pixels, of an animation those of its first frame.

    `draft_px`: a JPEG may be decoded smaller, down to twice this many pixels a side, its data are read to the end all
    the same. Raises UserError as `read_header` does.
    """
    with _checked(source, name, max_pixels) as image:
        header = _header(image, conversion)
        if draft_px is not None:
            image.draft("RGB", (draft_px, draft_px))
        return header, rgb(image, conversion)


def convert(image: Image.Image, *, name: str = "image", conversion: Conversion = "displayed") -> Image.Image:
    """A picture that Pillow has opened already, as RGB. Raises UserError where it cannot be decoded."""
    try:
        image.load()
        return image if image.mode == "RGB" and not treatments(image) else rgb(image, conversion)
    except Exception as error:
        raise UserError(f"the image {name!r} cannot be decoded ({error})", fix="replace or remove it") from None


def _header(image: Image.Image, conversion: Conversion) -> Header:
    done = treatments(image) if conversion == "displayed" else ()
    return Header(displayed_size(image, conversion), str(image.format), done)


@contextmanager
def _checked(source: Path | BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """The file opened by Pillow, its size checked; every exception of Pillow is turned into a UserError."""
    is_open = False
    try:
        with warnings.catch_warnings():
            # Our own limit decides, and a damaged file is named by the error.
            warnings.simplefilter("ignore")
            with Image.open(source, formats=FORMATS) as image:
                is_open = True
                width, height = image.size
                if width * height > max_pixels:
                    raise UserError(
                        f"the image {name!r} has {width}x{height} pixels, more than {max_pixels}",
                        fix="scale it down, or raise max_image_pixels",
                    )
                yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {name!r} is too large ({error})", fix="scale it down") from None
    except Exception as error:  # decoders raise whatever a broken file makes of them
        reason = f"{error}" or type(error).__name__
        if is_open:
            raise UserError(f"the image {name!r} cannot be decoded ({reason})", fix="replace or remove it") from None
        raise UserError(
            f"the file {name!r} is not a readable image ({reason})",
            fix=f"replace or remove it ({', '.join(FORMATS)} are read)",
        ) from None
