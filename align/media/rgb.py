"""A PIL image of any mode in, the RGB picture that people see out: upright, scaled by its true range, laid on white.

Image viewers, browsers, `transformers.image_utils.load_image` and `datasets` turn a picture as its EXIF orientation
says. 16-bit grey fills its 65536 values, floats fill 0..1 (or 0..255, or their own range), and what is transparent
shows the page behind it. `Image.convert("RGB")` does none of that; `plain` asks for it all the same,
as the authors of older models did.

Needs PIL and numpy only: it travels with the processors into checkpoint folders.
"""

from __future__ import annotations

from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image

Conversion = Literal["displayed", "plain"]

# As Pillow calls them; a JPEG with several pictures (MPO, as phones write) is opened as its first.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
WHITE = (255, 255, 255)
UPRIGHT = "turned upright (EXIF orientation)"
RESCALED = "grey of more than 8 bits scaled to 8"
ON_WHITE = "laid on white (transparency)"

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_HAS_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# Behind the pixels a PNG may hold what turns it; these are the kinds of chunks it stands in.
_PNG_TURNING_CHUNKS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
PNG_SIGNATURE_BYTES = 8


def rgb(image: Image.Image, conversion: Conversion = "displayed") -> Image.Image:
    """The picture as RGB; `plain`: by `Image.convert("RGB")` alone.

    Raises whatever a decoder makes of a broken file.
    """
    if conversion == "plain":
        return image.convert("RGB")
    turn = _TURNS.get(orientation(image))
    if _is_deep(image):
        image = _scaled_grey(image)
    if has_transparency(image):
        image = _on_white(image)
    picture = image.convert("RGB")
    if turn is None:
        return picture
    picture = picture.transpose(turn)
    # The turn is done: whoever reads the picture's EXIF again must not turn it twice.
    picture.info = {key: value for key, value in picture.info.items() if key not in ("exif", "xmp")}
    return picture


def displayed_size(image: Image.Image, conversion: Conversion = "displayed") -> tuple[int, int]:
    """(width, height) of what `rgb` gives, from the header."""
    width, height = image.size
    turned = conversion == "displayed" and orientation(image) in _SWAPS_SIDES
    if image.format == "TIFF":
        # Pillow turns TIFF by itself: `size` knows it where the tag says so, and not where XMP does.
        tag = image.tag_v2.get(ExifTags.Base.Orientation)  # type: ignore[attr-defined]
        turned = tag is None and _stated_orientation(image) in _SWAPS_SIDES
    return (height, width) if turned else (width, height)


def treatments(image: Image.Image) -> tuple[str, ...]:
    """What `rgb` does to a picture beyond `Image.convert("RGB")`, in words that can be counted; from the header."""
    turned = _stated_orientation(image) in _TURNS
    found = ((UPRIGHT, turned), (RESCALED, _is_deep(image)), (ON_WHITE, has_transparency(image)))
    return tuple(word for word, holds in found if holds)


def orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF (or XMP) counts them, 1 where it says nothing that can be read,
    or Pillow turns by itself (TIFF)."""
    return 1 if image.format == "TIFF" else _stated_orientation(image)


def _stated_orientation(image: Image.Image) -> int:
    if image.format == "PNG" and image.info.get("exif") is None and not _png_turns_late(image):
        # Pillow would decode all pixels to look for EXIF behind them.
        exif = Image.Image.getexif
    else:
        exif = type(image).getexif
    try:
        stated = exif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF: viewers show such a picture as it lies
        return 1
    return stated if isinstance(stated, int) and 1 <= stated <= len(_TURNS) + 1 else 1


def _png_turns_late(image: Image.Image) -> bool:
    """Whether a PNG has text or EXIF behind its pixels."""
    file: Any = getattr(image, "fp", None)
    if file is None:
        return False
    place = file.tell()
    try:
        file.seek(PNG_SIGNATURE_BYTES)
        return _late_chunk(file)
    finally:
        file.seek(place)


def _late_chunk(file: BinaryIO) -> bool:
    pixels_seen = False
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if pixels_seen and kind in _PNG_TURNING_CHUNKS:
            return True
        pixels_seen = pixels_seen or kind == b"IDAT"
        file.seek(length + 4, 1)
    return False


def has_transparency(image: Image.Image) -> bool:
    """Whether a picture has an alpha channel, a palette with one, or a transparent colour."""
    if image.mode in _HAS_ALPHA or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """A picture of one deep channel as 8-bit grey, with an alpha channel where one of its values stands for nothing."""
    values = np.asarray(image)
    values = values.astype(np.float64) if image.mode in ("I", "F") else values.astype(np.float32)
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range_of(values, image.mode)
    scaled = np.nan_to_num((values - low) * (255.0 / (high - low)), nan=0.0, posinf=255.0, neginf=0.0)
    grey = Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))
    nothing = image.info.get("transparency")
    if isinstance(nothing, int):
        grey.putalpha(Image.fromarray(np.where(values == nothing, 0, 255).astype(np.uint8)))
    # What turns the picture stays known; the transparent value is used up.
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def _range_of(values: np.ndarray, mode: str) -> tuple[float, float]:
    """The values that are black and white: the smallest usual range that holds all,
    else from the least to the greatest.

    >>> [_range_of(np.array(ends), "F") for ends in ([0.0, 0.5], [0.0, 200.0], [-5.0, 900.0])]
    [(0.0, 1.0), (0.0, 255.0), (-5.0, 900.0)]
    >>> _range_of(np.array([0, 200]), "I"), _range_of(np.array([0, 4000]), "I")
    ((0.0, 255.0), (0.0, 65535.0))
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    for top in (1.0, 255.0) if mode == "F" else (255.0, 65535.0):
        if low >= 0 and high <= top:
            return 0.0, top
    return low, high


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    layer = image.convert("RGBA")
    page = Image.new("RGBA", layer.size, (*WHITE, 255))
    return Image.alpha_composite(page, layer).convert("RGB")
