"""PIL images in, SigLIP's float32 tiles out, bit for bit as the published processors make them.

Resizing is PIL's bicubic filter; torchvision's is another and not used. The arrays equal those of transformers'
`SiglipImageProcessorPil` after the tiling of the original.
"""

from typing import Protocol

import numpy as np
from PIL import Image

from ..pixels import SIGLIP_MEAN, SIGLIP_STD, normalise
from .tiles import fit_size


class TileGrid(Protocol):
    """How an image is cut in tiles: `crop_px` their edge, `grid` their columns and rows."""

    @property
    def crop_px(self) -> int:
        """A tile's edge in pixels."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles for an image of this size."""


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
    return np.stack([normalise(tile, SIGLIP_MEAN, SIGLIP_STD) for tile in tiles])
