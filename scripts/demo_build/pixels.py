"""Canvases in, the two encoders' inputs out, as the Valley-Eagle processor makes them of a 112x112 picture.

A picture of exactly one tile gives the thumbnail and one equal tile, so the training encodes it once and uses the
features twice; the export checks the whole against the processor.
"""

from __future__ import annotations

import numpy as np
import torch

from demo_build.sizes import PATCH_PX, TILE_PX

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_SD = (0.26862954, 0.26130258, 0.27577711)
PATCHES = TILE_PX // PATCH_PX
MERGE = 2


def siglip_pixels(grey_BHW: np.ndarray) -> torch.Tensor:
    """`(B, 112, 112) uint8` to `(B, 3, 112, 112) float32` in -1..1."""
    scaled_BHW = torch.from_numpy(grey_BHW).float() / 255.0
    return ((scaled_BHW - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def eagle_pixels(grey_BHW: np.ndarray) -> torch.Tensor:
    """`(B, 112, 112) uint8` to `(B * 64, 1176) float32`: patches in 2x2 merge order, each frame given twice."""
    scaled_BHW = torch.from_numpy(grey_BHW).float() / 255.0
    mean_C, sd_C = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_SD)
    image_BCHW = (scaled_BHW[:, None] - mean_C[None, :, None, None]) / sd_C[None, :, None, None]
    num_blocks = PATCHES // MERGE
    blocks = image_BCHW.reshape(-1, 3, num_blocks, MERGE, PATCH_PX, num_blocks, MERGE, PATCH_PX)
    ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    twice = ordered[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return twice.reshape(-1, 3 * 2 * PATCH_PX * PATCH_PX)


def eagle_grid(num_images: int) -> torch.Tensor:
    """`(num_images, 3) int64`: one frame of 8x8 patches each."""
    return torch.tensor([[1, PATCHES, PATCHES]]).repeat(num_images, 1)


def merge_order(row_major_BP: torch.Tensor) -> torch.Tensor:
    """`(B, 64)` in row-major order to the same in the Qwen2-VL encoder's 2x2 merge order."""
    num_blocks = PATCHES // MERGE
    blocks = row_major_BP.reshape(-1, num_blocks, MERGE, num_blocks, MERGE)
    return blocks.permute(0, 1, 3, 2, 4).reshape(-1, PATCHES * PATCHES)
