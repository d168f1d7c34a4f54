"""Images in, what the Qwen2-VL encoder takes out: sizes, counts of tokens and float32 patches,
bit for bit as published.

Resizing is PIL's bicubic filter; torchvision's is another and not used. The patches equal those of transformers'
`Qwen2VLImageProcessorPil` after the first resize of the original. Sizes are `(width, height)` in pixels.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .pixels import normalise

MAX_ASPECT_RATIO = 200
# Limits of the first of the two resizes: qwen_vl_utils 0.0.8 applies them to every image before the processor does.
FIRST_MIN_PIXELS = 4 * 28 * 28
FIRST_MAX_PIXELS = 16384 * 28 * 28


def smart_resize(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The multiple of `factor` nearest to an image's size whose area lies within the limits (Qwen2-VL's rule).

    Raises ValueError for sides more than 200 times as long as each other.

    >>> smart_resize(1024, 768, factor=28, min_pixels=3136, max_pixels=571536)
    (868, 644)
    """
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"expected an image whose sides differ by a factor of {MAX_ASPECT_RATIO} at most, found {width}x{height}; "
            "crop it or leave it out"
        )
    new_w, new_h = (max(factor, round(side / factor) * factor) for side in (width, height))
    if new_w * new_h > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_w, new_h = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif new_w * new_h < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_w, new_h = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return new_w, new_h


@dataclass(frozen=True)
class PatchGeometry:
    """What of an encoder's config decides its patches: their edge, patches merged along a side,
    frames a patch covers."""

    patch_px: int
    merge: int
    temporal: int

    @classmethod
    def of(cls, config: Any) -> "PatchGeometry":
        """That of a `Qwen2VLVisionConfig`."""
        return cls(config.patch_size, config.spatial_merge_size, config.temporal_patch_size)

    @property
    def factor(self) -> int:
        """Edge in pixels of what becomes one token."""
        return self.patch_px * self.merge

    def sizes(
        self, width: int, height: int, min_pixels: int, max_pixels: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two sizes an image is resized to, one after the other."""
        first = smart_resize(width, height, factor=28, min_pixels=FIRST_MIN_PIXELS, max_pixels=FIRST_MAX_PIXELS)
        return first, smart_resize(*first, factor=self.factor, min_pixels=min_pixels, max_pixels=max_pixels)

    def num_tokens(self, width: int, height: int, min_pixels: int, max_pixels: int) -> int:
        """Visual tokens of an image of this size."""
        _, (new_w, new_h) = self.sizes(width, height, min_pixels, max_pixels)
        return (new_w // self.factor) * (new_h // self.factor)

    def counts(self, grids: torch.Tensor) -> list[int]:
        """Tokens of every image from its grid of patches, `(I, 3)`."""
        return (grids.prod(dim=-1) // self.merge**2).tolist()

    def blank(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and grid of the smallest blank image, which is one token."""
        patches = torch.zeros(self.merge**2, 3 * self.temporal * self.patch_px**2, device=device)
        return patches, torch.tensor([[1, self.merge, self.merge]], device=device)


def qwen2vl_pixels(
    image: Image.Image, geometry: PatchGeometry, *, min_pixels: int, max_pixels: int
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An image as the encoder takes it: patches `(N, 3 * 2 * 14 * 14)` float32 and their grid (1, rows, columns).

    The patches of each 2 x 2 block that the encoder merges lie next to each other;
    a still image is its own second frame.
    """
    for size in geometry.sizes(*image.size, min_pixels, max_pixels):
        image = image.resize(size, Image.Resampling.BICUBIC)
    patch, merge = geometry.patch_px, geometry.merge
    rows, columns = image.height // patch, image.width // patch
    blocks = normalise(image).reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    # block row, block column, row in block, column in block, channel, then the patch itself
    patches = blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, patch * patch)
    return np.repeat(patches, geometry.temporal, axis=2).reshape(rows * columns, -1), (1, rows, columns)


class PatchBatch:
    """Collects the patches and grids of a batch."""

    def __init__(self, geometry: PatchGeometry) -> None:
        self.geometry = geometry
        self.patches: list[np.ndarray] = []
        self.grids: list[tuple[int, int, int]] = []

    def add(self, image: Image.Image, *, min_pixels: int, max_pixels: int) -> int:
        """Takes an RGB image; gives its number of tokens."""
        patches, grid = qwen2vl_pixels(image, self.geometry, min_pixels=min_pixels, max_pixels=max_pixels)
        self.patches.append(patches)
        self.grids.append(grid)
        return len(patches) // self.geometry.merge**2

    def arrays(self, name: str) -> dict[str, torch.Tensor]:
        """The patches under `name` and their grids; empty where there is no image."""
        if not self.patches:
            return {}
        return {name: torch.from_numpy(np.concatenate(self.patches)), "image_grid_thw": torch.tensor(self.grids)}
