"""PIL images in, cropped, padded and normalised float32 pixels out; PIL's filters only, no torchvision."""

import numpy as np
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MAX_SIDE_RATIO = 200


def resize_short_side(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """The image with a short side of `side` pixels; its long side is rounded down.

    Raises ValueError for sides that differ by a factor above 200: the result would be wider than it is worth.
    """
    width, height = image.size
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise ValueError(
            f"expected sides that differ by a factor of at most {MAX_SIDE_RATIO}, found {width} x {height} pixels"
        )
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return image if image.size == size else image.resize(size, resample)


def centre_crop(image: Image.Image, side: int, *, rounded: bool = False) -> Image.Image:
    """The middle square. Half a pixel of margin is dropped on the left and top, or `rounded` to the even neighbour."""
    left, top = ((extent - side) / 2 for extent in image.size)
    left, top = (round(left), round(top)) if rounded else (int(left), int(top))
    return image.crop((left, top, left + side, top + side))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of its long side."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def normalise(image: Image.Image, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> np.ndarray:
    """An RGB image's bytes to `(value / 255 - mean) / std`, `(3, H, W)` float32,
    rounded where the published ones round.

    A byte has 256 values, so a table per channel replaces arithmetic on every pixel.
    """
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    tables = ((scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True))
    channels = np.asarray(image).transpose(2, 0, 1)
    return np.stack([table[channel] for table, channel in zip(tables, channels, strict=True)])
