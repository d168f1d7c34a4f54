"""A picture in, the same picture saying less out: what image-conditional preference holds the real one against.

The size stays, so a prompt has as many tokens as before. What is drawn depends on `seed` and on `key` (the question)
alone: it is the same in every epoch, process and run, and log-probabilities under it can be kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from PIL import Image, ImageFilter

from align.media.images import GREY

Corruption = Literal["crop", "blank", "blur", "shuffle", "other"]
# Of the area, at most (mDPO, arXiv 2406.11839, section 3: "randomly cropping 0-20% of the original image").
CROPPED_SHARE = 0.2
# Of the longer side: nothing smaller than that is left.
BLUR_SHARE = 0.1
SHUFFLED_SIDE = 8


def corrupted(
    picture: Image.Image, kind: Corruption, seed: int, key: str, another: Callable[[random.Random], Image.Image]
) -> Image.Image:
    """The picture with less in it, of the same size and with the same `info`.

    `crop`: a part of 0 to 20 % of the area, enlarged. `blank`: grey. `blur`: Gaussian, of a tenth of the longer side.
    `shuffle`: 8 x 8 patches in another order. `other`: the picture that `another` draws.
    """
    drawn = random.Random(f"{seed}/{kind}/{key}")
    if kind == "crop":
        result = _cropped(picture, drawn)
    elif kind == "blank":
        result = Image.new("RGB", picture.size, GREY)
    elif kind == "blur":
        result = picture.filter(ImageFilter.GaussianBlur(BLUR_SHARE * max(picture.size)))
    elif kind == "shuffle":
        result = _shuffled(picture, drawn)
    else:
        result = another(drawn).resize(picture.size)
    result.info.update(picture.info)
    return result


def _cropped(picture: Image.Image, drawn: random.Random) -> Image.Image:
    side = drawn.uniform(0, CROPPED_SHARE) ** 0.5
    width, height = (max(1, round(side * length)) for length in picture.size)
    left, top = drawn.randint(0, picture.width - width), drawn.randint(0, picture.height - height)
    return picture.crop((left, top, left + width, top + height)).resize(picture.size)


def _shuffled(picture: Image.Image, drawn: random.Random) -> Image.Image:
    """Patches of one size; what the picture has beyond eight of them a side stays."""
    across, down = (min(SHUFFLED_SIDE, length) for length in picture.size)
    width, height = picture.width // across, picture.height // down
    corners = [(column * width, row * height) for row in range(down) for column in range(across)]
    places = drawn.sample(corners, len(corners))
    result = picture.copy()
    for (left, top), place in zip(corners, places, strict=True):
        result.paste(picture.crop((left, top, left + width, top + height)), place)
    return result
