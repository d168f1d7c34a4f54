"""Whatever may stand for an image in, an RGB image out; nothing is fetched from a network."""

import base64
import io
import os
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from ..media.rgb import FORMATS, rgb

# A picture whose `info` has this key is a frame decoded from a video; its value is the frame's number,
# -1 where not known.
FRAME_KEY = "video_frame"
# One whose `info` has this key is a frame that was an image file.
FRAME_FILE_KEY = "frame_file"


def open_image(source: Any) -> Image.Image:
    """An RGB image, upright and on white, from an image, an array `(H, W, 3)` uint8, a path, an address,
    or encoded bytes.

    Addresses are `file://` or `data:`. Raises ValueError for anything else, and where a file cannot be decoded.
    """
    if isinstance(source, Image.Image):
        return rgb(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise ValueError(f"expected an array of bytes (uint8), found {source.dtype}")
        return rgb(Image.fromarray(source))
    if isinstance(source, bytes):
        return _decoded(io.BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, dict) and source.get("bytes"):
        return open_image(source["bytes"])
    if isinstance(source, dict) and source.get("path"):
        return open_image(source["path"])
    if isinstance(source, (str, os.PathLike)):
        address = os.fspath(source)
        if address.startswith("data:"):
            return open_image(base64.b64decode(address.partition(",")[2]))
        if address.startswith(("http://", "https://")):
            raise ValueError(f"expected an image or a local path, found the address {address!r}; download it first")
        path = url2pathname(urlsplit(address).path) if address.startswith("file://") else address
        return _decoded(path, path)
    raise ValueError(f"expected an image, an array, a path or encoded bytes, found {type(source).__name__}")


def _decoded(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes of them
        raise ValueError(f"the image {name!r} cannot be decoded ({error})") from None


def as_frame(picture: Image.Image) -> Image.Image:
    """The picture, known as a frame of a video."""
    if FRAME_KEY not in picture.info:
        picture = picture.copy()
        picture.info[FRAME_KEY] = -1
    return picture


def is_frame(picture: Any) -> bool:
    """Whether a picture is known as a frame of a video."""
    info = getattr(picture, "info", {})
    return FRAME_KEY in info or FRAME_FILE_KEY in info
