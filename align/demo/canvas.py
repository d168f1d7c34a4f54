"""A seed and a part of the data in, a picture of one to four real handwritten digits out.

The digits are the 1,797 scans of the UCI set that scikit-learn carries (8x8 pixels, 16 grey levels, in file order, so
that neighbours are by one writer). The three parts never overlap: what is asked at evaluation was seen by no training.
Left out on purpose: questions about the pictures (`questions.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from align.errors import UserError
from align.versions import install_extra

CANVAS_PX = 112
MAX_DIGITS = 4
MIN_SIZE_PX, MAX_SIZE_PX = 24, 36
MIN_GAP_PX = 20
MAX_TURN_DEGREES = 20.0
NOISE_SD = 20.0
BACKGROUND = 30.0

#: Which scans serve which purpose, as (first, past the last) in the file's order.
PARTS: dict[str, tuple[int, int]] = {"train": (0, 700), "policy": (700, 1250), "eval": (1250, 1797)}


@dataclass(frozen=True)
class Placed:
    """One digit on a canvas; the centre and the edge length are in pixels."""

    digit: int
    x_px: float
    y_px: float
    size_px: int


@dataclass(frozen=True)
class Canvas:
    """A picture `(CANVAS_PX, CANVAS_PX) uint8` and its digits from left to right."""

    pixels: np.ndarray
    placed: tuple[Placed, ...]

    @property
    def digits(self) -> list[int]:
        """The digits on the canvas."""
        return [item.digit for item in self.placed]

    def image(self) -> Image.Image:
        """The canvas as a picture."""
        return Image.fromarray(self.pixels)


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans `(1797, 8, 8) uint8` (0 to 255) and their labels `(1797,) int64`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the demo's handwritten digits come with scikit-learn, which is not installed",
            fix=f"{install_extra('demo')} (or run `make demo`, which does)",
        ) from error
    data = load_digits()
    return np.clip(data.images * 16.0, 0, 255).astype(np.uint8), data.target.astype(np.int64)


def draw(rng: random.Random, part: str, digits: Sequence[int] | None = None) -> Canvas:
    """A canvas of one to four digits of `part`, or of these `digits`; equal states of `rng` give equal pixels."""
    first, past_last = PARTS[part]
    scans, labels = _scans()
    num_digits = rng.randint(1, MAX_DIGITS) if digits is None else len(digits)
    ink = np.zeros((CANVAS_PX, CANVAS_PX), dtype=np.float32)
    placed = []
    for at, x_px in enumerate(_centres(rng, num_digits)):
        index = rng.randrange(first, past_last)
        while digits is not None and labels[index] != digits[at]:
            index = rng.randrange(first, past_last)
        size_px = rng.randint(MIN_SIZE_PX, MAX_SIZE_PX)
        y_px = rng.uniform(size_px / 2, CANVAS_PX - size_px / 2)
        _paste(ink, scans[index], size_px, rng.uniform(-MAX_TURN_DEGREES, MAX_TURN_DEGREES), (x_px, y_px))
        placed.append(Placed(int(labels[index]), x_px, y_px, size_px))
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0.0, NOISE_SD, ink.shape)
    pixels = np.clip(BACKGROUND + ink * (225.0 / 255.0) + noise, 0, 255).astype(np.uint8)
    return Canvas(pixels, tuple(placed))


def _centres(rng: random.Random, num_digits: int) -> list[float]:
    """Sorted x-centres in pixels, each at least `MIN_GAP_PX` right of the one before."""
    margin = MAX_SIZE_PX / 2
    slack = CANVAS_PX - 2 * margin - MIN_GAP_PX * (num_digits - 1)
    offsets = sorted(rng.uniform(0, slack) for _ in range(num_digits))
    return [margin + offset + MIN_GAP_PX * index for index, offset in enumerate(offsets)]


def _paste(ink: np.ndarray, scan: np.ndarray, size_px: int, degrees: float, centre: tuple[float, float]) -> None:
    """Lay one scaled and turned scan over `ink` in place; where two meet, the brighter wins."""
    glyph = Image.fromarray(scan).resize((size_px, size_px), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(degrees, Image.Resampling.BILINEAR)
    left = min(max(round(centre[0] - size_px / 2), 0), CANVAS_PX - size_px)
    top = min(max(round(centre[1] - size_px / 2), 0), CANVAS_PX - size_px)
    window = ink[top : top + size_px, left : left + size_px]
    np.maximum(window, np.asarray(glyph, dtype=np.float32), out=window)
