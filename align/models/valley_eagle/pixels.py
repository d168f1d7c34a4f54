"""PIL images in, the two encoders' float32 pixel arrays out, bit for bit as the published processors make them.

Resizing is PIL's bicubic filter; torchvision's is another and not used. The arrays equal those of transformers'
`SiglipImageProcessorPil` and `Qwen2VLImageProcessorPil` after the tiling and the first resize of the original.
"""

from typing import Protocol

import numpy as np
from PIL import Image

from .tiles import Geometry, fit_size

SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class TileGrid(Protocol):
    """How an image is cut in tiles: `crop_px` their edge, `grid` their columns and rows."""

    @property
    def crop_px(self) -> int: ...

    def grid(self, width: int, height: int) -> tuple[int, int]: ...


def cut_tiles(image: Image.Image, geometry: TileGrid, *, tiled: bool) -> list[Image.Image]:
    """The whole image squeezed into one tile, then, where tiled, the image on its black canvas cut row by row."""
    edge = geometry.crop_px
    whole = image.resize((edge, edge), Image.Resampling.BICUBIC)
    if not tiled:
        return [whole]
    columns, rows = geometry.grid(*image.size)
    canvas = Image.new("RGB", (columns * edge, rows * edge), (0, 0, 0))
    fitted = image.resize(fit_size(*image.size, canvas.size), Image.Resampling.BICUBIC)
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    corners = [(column * edge, row * edge) for row in range(rows) for column in range(columns)]
    return [whole, *(canvas.crop((left, top, left + edge, top + edge)) for left, top in corners)]


def siglip_pixels(tiles: list[Image.Image]) -> np.ndarray:
    """Tiles as SigLIP takes them: `(T, 3, S, S)` float32."""
    return np.stack([_normalise(tile, SIGLIP_MEAN, SIGLIP_STD) for tile in tiles])


def qwen2vl_pixels(
    image: Image.Image, geometry: Geometry, *, min_pixels: int, max_pixels: int
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An image as the Qwen2-VL encoder takes it: patches `(N, 3 * 2 * 14 * 14)` float32 and their grid (1, rows, columns).

    The patches of each 2 x 2 block that the encoder merges lie next to each other; a still image is its own second frame.
    """
    for size in geometry.eagle_sizes(*image.size, min_pixels, max_pixels):
        image = image.resize(size, Image.Resampling.BICUBIC)
    patch, merge = geometry.eagle_patch_px, geometry.eagle_merge
    rows, columns = image.height // patch, image.width // patch
    blocks = _normalise(image, CLIP_MEAN, CLIP_STD).reshape(
        3, rows // merge, merge, patch, columns // merge, merge, patch
    )
    # block row, block column, row in block, column in block, channel, then the patch itself
    patches = blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, patch * patch)
    return np.repeat(patches, geometry.eagle_temporal, axis=2).reshape(rows * columns, -1), (1, rows, columns)


def _normalise(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Bytes to `(value / 255 - mean) / std`, `(3, H, W)` float32, rounded where the published processors round.

    A byte has 256 values, so a table per channel replaces arithmetic on every pixel.
    """
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    channels = np.asarray(image).transpose(2, 0, 1)
    tables = ((scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True))
    return np.stack([table[channel] for table, channel in zip(tables, channels, strict=True)])
