"""Image sizes in, what becomes of the encoder's patches out: which tiles, which rows and columns, how many tokens.

All of it is decided here, in whole numbers that travel to the model, so that the floating-point arithmetic of the
original stands in one place. It is float64 in the original's order, sizes are `(width, height)` and un-padding
truncates; transformers' llava_onevision rounds and takes heights first,
and differs for some sizes (423 x 188 keeps two rows more).
"""

import math
from dataclasses import astuple, dataclass

from ..valley_eagle.tiles import best_canvas, unpadded

# A map of tokens that exceeds its limit by less than this factor along a side is left as it is.
POOLING_TOLERANCE = 1.1


@dataclass(frozen=True)
class ImageLayout:
    """What becomes of the patches of one image or video; every field an integer, so that it fits in a tensor.

    Tiled: the whole image as one tile, then `tile_rows * tile_columns` tiles, of whose joint map the rows `top` to
    `bottom` and columns `left` to `right` are kept and resized to `rows` x `columns`. Untiled: one view, `tile_rows` 0.
    Video: `num_frames` views, each resized to `rows` x `columns`.
    """

    num_frames: int = 0
    tile_rows: int = 0
    tile_columns: int = 0
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    rows: int = 0
    columns: int = 0

    @property
    def num_views(self) -> int:
        """Pictures that the encoder sees: tiles or frames."""
        return self.num_frames or 1 + self.tile_rows * self.tile_columns

    def num_tokens(self, patches_per_side: int) -> int:
        """Visual tokens: one newline behind every row of the map, behind an untiled view, or behind all frames."""
        if self.num_frames:
            return self.num_frames * self.rows * self.columns + 1
        return patches_per_side**2 + (self.rows * (self.columns + 1) if self.tile_rows else 1)

    def as_row(self) -> tuple[int, ...]:
        """As a row of a tensor."""
        return astuple(self)


NUM_LAYOUT_FIELDS = len(ImageLayout().as_row())


@dataclass(frozen=True)
class Tiling:
    """What decides the layout of an image: `canvases` in pixels, `edge_px` of a tile, `side` patches along it.

    `max_tiles`: a map larger than so many tiles is made smaller; None leaves every map as it is.
    """

    canvases: tuple[tuple[int, int], ...]
    edge_px: int
    side: int
    max_tiles: int | None

    @property
    def crop_px(self) -> int:
        """A tile's edge in pixels."""
        return self.edge_px

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles."""
        canvas_w, canvas_h = best_canvas(width, height, self.canvases)
        return canvas_w // self.edge_px, canvas_h // self.edge_px

    def layout(self, width: int, height: int) -> ImageLayout:
        """The layout of an image that is tiled.

        >>> canvases = tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7))
        >>> tiling = Tiling(canvases, edge_px=384, side=27, max_tiles=9)
        >>> tiling.layout(1400, 1100)
        ImageLayout(num_frames=0, tile_rows=3, tile_columns=4, top=0, bottom=81, left=2, right=106, rows=71, columns=91)
        >>> tiling.layout(423, 188).num_tokens(27)
        1994
        """
        grid_columns, grid_rows = self.grid(width, height)
        kept_rows, kept_columns = unpadded(width, height, grid_columns * self.side, grid_rows * self.side)
        rows, columns = kept_rows.stop - kept_rows.start, kept_columns.stop - kept_columns.start
        if self.max_tiles is not None:
            times = math.sqrt(rows * columns / (self.max_tiles * self.side**2))
            if times > POOLING_TOLERANCE:
                rows, columns = int(rows // times), int(columns // times)
        window = (kept_rows.start, kept_rows.stop, kept_columns.start, kept_columns.stop)
        return ImageLayout(0, grid_rows, grid_columns, *window, rows, columns)

    def video_layout(self, num_frames: int, stride: int) -> ImageLayout:
        """The layout of a video whose frames' maps are made `stride` times smaller along each side, rounded up."""
        side = math.ceil(self.side / stride)
        return ImageLayout(num_frames=num_frames, rows=side, columns=side)
