"""Image sizes in, tile canvases, patch grids and token counts out: the geometry of Valley-Eagle, without a pixel.

Everything here is float64 arithmetic in the order of the published code, because some sizes turn on the last bit
(1316 x 94 keeps two rows, not four). Sizes are `(width, height)` unless a name says otherwise.
"""

import ast
import math
import re
from dataclasses import dataclass

from ..qwen2vl import PatchGeometry


def parse_canvases(pinpoints: str | list, crop_px: int) -> tuple[tuple[int, int], ...]:
    """Candidate canvases in pixels, in the order in which ties are decided.

    `"(1x1),...,(3x3)"` takes its first and last pair as inclusive ranges, widths outermost; a list of pixel pairs, or
    its Python literal, is taken as it is.

    >>> parse_canvases("(1x1),...,(2x2)", 384)
    ((384, 384), (384, 768), (768, 384), (768, 768))
    >>> parse_canvases("[[384, 768]]", 384)
    ((384, 768),)
    """
    canvases = _canvases(pinpoints, crop_px)
    if not canvases:
        raise ValueError(f"config.json: expected canvases for tiles, found none in {pinpoints!r}")
    return canvases


def _canvases(pinpoints: str | list, crop_px: int) -> tuple[tuple[int, int], ...]:
    if isinstance(pinpoints, str) and "x" in pinpoints:
        pairs = re.findall(r"\((\d+)x(\d+)\)", pinpoints)
        if not pairs:
            raise ValueError(f"grid_pinpoints: expected a form like '(1x1),...,(3x3)', found {pinpoints!r}")
        (first_w, first_h), (last_w, last_h) = ([int(side) for side in pair] for pair in (pairs[0], pairs[-1]))
        columns, rows = range(first_w, last_w + 1), range(first_h, last_h + 1)
        return tuple((crop_px * i, crop_px * j) for i in columns for j in rows)
    try:
        pixel_pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return tuple((int(width), int(height)) for width, height in pixel_pairs)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"config.json: expected pairs of pixels for the canvases of tiles, found {pinpoints!r}"
        ) from None


def best_canvas(width: int, height: int, canvases: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas that keeps most of the image's pixels; among equals the one that wastes least, then the first."""
    best, best_effective, best_wasted = canvases[0], -1, math.inf
    for canvas_w, canvas_h in canvases:
        scale = min(canvas_w / width, canvas_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_w * canvas_h - effective
        if effective > best_effective or (effective == best_effective and wasted < best_wasted):
            best, best_effective, best_wasted = (canvas_w, canvas_h), effective, wasted
    return best


def fit_size(width: int, height: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """The size an image is resized to so that it fits a canvas, one side filling it."""
    scale_w, scale_h = canvas[0] / width, canvas[1] / height
    if scale_w < scale_h:
        return canvas[0], min(math.ceil(height * scale_w), canvas[1])
    return min(math.ceil(width * scale_h), canvas[0]), canvas[1]


def unpadded(width: int, height: int, columns: int, rows: int) -> tuple[slice, slice]:
    """The rows and columns of a `rows x columns` token map that are not padding.

    Plain truncation, in exactly this order of operations; llava_next rounds instead and differs for some sizes.

    >>> unpadded(1316, 94, 42, 14)
    (slice(6, 8, None), slice(0, 42, None))
    """
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return slice(pad, rows - pad), slice(0, columns)
    pad = (columns - int(width * (rows / height))) // 2
    return slice(0, rows), slice(pad, columns - pad)


@dataclass(frozen=True)
class Geometry:
    """What of a checkpoint's config decides how many tokens an image of a given size has.

    `tokens_per_side`: tokens along a tile's edge after the projector. `eagle`: that of the Qwen2-VL encoder;
    None without.
    """

    crop_px: int
    tokens_per_side: int
    canvases: tuple[tuple[int, int], ...]
    anyres: bool
    only_crop_single_image: bool
    max_vision_token: int
    eagle: PatchGeometry | None

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile."""
        return self.tokens_per_side**2

    def is_tiled(self, num_images: int) -> bool:
        """Whether images are cut in tiles in a sample with so many of them."""
        return self.anyres and (num_images == 1 or not self.only_crop_single_image)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles of an image that is tiled."""
        canvas_w, canvas_h = best_canvas(width, height, self.canvases)
        return canvas_w // self.crop_px, canvas_h // self.crop_px

    def num_tiles(self, width: int, height: int, *, tiled: bool) -> int:
        """Tiles of an image of this size, the overview counted."""
        if not tiled:
            return 1
        columns, rows = self.grid(width, height)
        return 1 + columns * rows

    def map_window(self, width: int, height: int) -> tuple[slice, slice]:
        """Rows and columns of a tiled image's token map that are kept."""
        columns, rows = self.grid(width, height)
        return unpadded(width, height, columns * self.tokens_per_side, rows * self.tokens_per_side)

    def map_size(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tokens of a tiled image's map, after un-padding and, where too big, pooling."""
        row_slice, column_slice = self.map_window(width, height)
        rows, columns = row_slice.stop - row_slice.start, column_slice.stop - column_slice.start
        limit = self.max_vision_token - self.tokens_per_tile
        if rows * columns <= limit:
            return rows, columns
        ratio = rows / columns
        return int(math.sqrt(limit / ratio) * ratio), int(math.sqrt(limit / ratio))

    def pooled_side(self, num_tiles: int) -> int:
        """Tokens along a tile's edge without the Qwen2-VL encoder, where all tiles of an image share one limit."""
        if num_tiles * self.tokens_per_tile <= self.max_vision_token:
            return self.tokens_per_side
        return int(math.sqrt(self.max_vision_token / num_tiles))

    def num_tile_tokens(self, width: int, height: int, *, tiled: bool) -> int:
        """Tokens that the SigLIP branch gives for one image."""
        num_tiles = self.num_tiles(width, height, tiled=tiled)
        if not self.eagle:
            return num_tiles * self.pooled_side(num_tiles) ** 2
        if num_tiles == 1:
            return self.tokens_per_tile
        rows, columns = self.map_size(width, height)
        return self.tokens_per_tile + rows * columns

    def num_eagle_tokens(self, width: int, height: int, min_pixels: int, max_pixels: int) -> int:
        """Tokens that the Qwen2-VL branch gives for one image; 0 where the checkpoint has no such encoder."""
        return self.eagle.num_tokens(width, height, min_pixels, max_pixels) if self.eagle else 0
