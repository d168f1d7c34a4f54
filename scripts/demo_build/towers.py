"""Stage one: each encoder learns to say for every patch which digit covers it, so that reading is quick to learn after.

Without this stage the whole model does not learn to read in any reasonable time on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from align.demo.canvas import Canvas, draw
from demo_build.pixels import PATCHES, eagle_grid, eagle_pixels, merge_order, siglip_pixels
from demo_build.schedule import cosine_with_warmup
from demo_build.sizes import EAGLE, PATCH_PX, SIGLIP

NO_DIGIT = 10
NUM_CLASSES = 11


def patch_labels(canvas: Canvas) -> np.ndarray:
    """`(64,) int64`, row-major: the digit whose box holds the patch's centre (the nearest one), or `NO_DIGIT`."""
    middle = np.arange(PATCHES) * PATCH_PX + PATCH_PX / 2
    x_P, y_P = (grid.reshape(-1) for grid in np.meshgrid(middle, middle))
    labels = np.full(x_P.shape, NO_DIGIT)
    nearest = np.full(x_P.shape, np.inf)
    for item in canvas.placed:
        distance = np.maximum(abs(x_P - item.x_px), abs(y_P - item.y_px))
        hit = (distance <= item.size_px / 2) & (distance < nearest)
        labels[hit], nearest[hit] = item.digit, distance[hit]
    return labels


class PatchBatches(IterableDataset):
    """An endless stream of `(pixels (B, 112, 112) uint8, labels (B, 64) int64)`, fixed by its seed."""

    def __init__(self, part: str, batch_size: int, seed: int) -> None:
        self.part, self.batch_size, self.seed = part, batch_size, seed

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = random.Random(self.seed)
        while True:
            canvases = [draw(rng, self.part) for _ in range(self.batch_size)]
            yield np.stack([c.pixels for c in canvases]), np.stack([patch_labels(c) for c in canvases])


class PatchReader(nn.Module):
    """An encoder and a linear head over its patches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "siglip":
            self.tower: nn.Module = SiglipVisionModel(SiglipVisionConfig(**SIGLIP))
            width = SIGLIP["hidden_size"]
        else:
            self.tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**EAGLE))
            width = EAGLE["embed_dim"]
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, grey_BHW: np.ndarray) -> torch.Tensor:
        """Class logits `(B, 64, 11)`, patches in the encoder's own order."""
        if self.kind == "siglip":
            hidden = self.tower(siglip_pixels(grey_BHW)).last_hidden_state
        else:
            grid = eagle_grid(len(grey_BHW))
            hidden = self.tower(eagle_pixels(grey_BHW), grid_thw=grid).last_hidden_state
            hidden = hidden.reshape(len(grey_BHW), PATCHES * PATCHES, -1)
        return self.head(hidden)

    def order(self, labels_BP: np.ndarray) -> torch.Tensor:
        labels = torch.from_numpy(labels_BP)
        return labels if self.kind == "siglip" else merge_order(labels)


def train_tower(kind: str, out: Path, *, num_steps: int, seed: int, log: Any, batch_size: int = 64) -> None:
    """Train one encoder and write its state dict to `out`."""
    torch.manual_seed(seed)
    reader = PatchReader(kind)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(num_steps, 200))
    stream = iter(DataLoader(PatchBatches("train", batch_size, seed), batch_size=None, num_workers=1, collate_fn=_same))
    for step in range(num_steps):
        pixels, labels = next(stream)
        logits = reader(pixels)
        target = reader.order(labels)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0 or step + 1 == num_steps:
            log(f"tower {kind} step {step + 1} loss {loss.item():.3f} right on digit patches {_right(reader):.3f}")
            torch.save(reader.tower.state_dict(), out.with_suffix(".part"))
    out.with_suffix(".part").replace(out)


def _same(batch: Any) -> Any:
    return batch


@torch.no_grad()
def _right(reader: PatchReader) -> float:
    """Share of digit patches named right on pictures whose scans no training uses."""
    pixels, labels = next(iter(PatchBatches("policy", 128, seed=1)))
    target = reader.order(labels)
    found = reader(pixels).argmax(-1)
    return (found == target)[target != NO_DIGIT].float().mean().item()
