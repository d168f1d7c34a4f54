"""A picture in, a fingerprint out that changes little when the picture is scaled, recompressed or lightly edited.

Two difference hashes (which of two neighbouring cells is brighter, across and down, 8 x 8 each: 128 bits) and the
colours of an 8 x 8 thumbnail. The colours keep apart what hashes cannot: flat pictures, which all hash alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

GRID = 8
HASH_BYTES = 2 * GRID * GRID // 8
MAX_BITS = 10
MAX_COLOUR = 16.0
# Rows of one side compared with all of the other at a time: 64 MiB of hashes for 65,536 of the others.
BLOCK = 64


@dataclass(frozen=True)
class Fingerprints:
    """Of n pictures: `bits` (n, 16) uint8, `colours` (n, 192) uint8."""

    bits: np.ndarray
    colours: np.ndarray

    def __len__(self) -> int:
        return len(self.bits)


def fingerprint(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The hash bits (16,) and thumbnail colours (192,) of a picture, uint8 both."""
    rgb = image.convert("RGB")
    grey = rgb.convert("L")
    across = np.asarray(grey.resize((GRID + 1, GRID), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((GRID, GRID + 1), Image.Resampling.BOX), dtype=np.int16)
    bits = np.concatenate([(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()])
    colours = np.asarray(rgb.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.uint8).ravel()
    return np.packbits(bits), colours


def stack(prints: Sequence[tuple[np.ndarray, np.ndarray]]) -> Fingerprints:
    """Fingerprints one below the other."""
    bits = np.array([one[0] for one in prints], dtype=np.uint8).reshape(-1, HASH_BYTES)
    colours = np.array([one[1] for one in prints], dtype=np.uint8).reshape(-1, 3 * GRID * GRID)
    return Fingerprints(bits, colours)


def near_pairs(
    ones: Fingerprints, others: Fingerprints, *, max_bits: int = MAX_BITS, max_colour: float = MAX_COLOUR
) -> Iterator[tuple[int, int, int]]:
    """Places (i, j) of pictures that differ by at most `max_bits` bits, with that number.

    Their thumbnails must also differ by at most `max_colour` (mean over channels, of 255).
    """
    mine, theirs = (np.ascontiguousarray(prints.bits).view(np.uint64) for prints in (ones, others))
    for start in range(0, len(ones), BLOCK):
        differing = np.bitwise_count(mine[start : start + BLOCK, None] ^ theirs[None])
        distances = differing[..., 0] + differing[..., 1]
        for row in np.flatnonzero((distances <= max_bits).any(axis=1)):
            near = np.flatnonzero(distances[row] <= max_bits)
            colours = np.abs(ones.colours[start + row].astype(np.int16) - others.colours[near]).mean(axis=1)
            for j in near[colours <= max_colour]:
                yield start + int(row), int(j), int(distances[row, j])
