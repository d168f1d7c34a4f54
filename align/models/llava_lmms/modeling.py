"""Token ids and image tensors in, hidden states and logits out: LLaVA-OneVision on transformers' Qwen2 and SigLIP.

SigLIP sees the whole image and its tiles as squares of 384 pixels; the output of its last stored layer, before the
final normalisation, goes through a perceptron; the tiles' patches are put together as one map, from which what shows
padding is cut, and which is resized where it is too large; a learned token ends every row of it (LLaVA-OneVision,
arXiv 2408.03326).

Shapes: B sequences, L tokens, D text width, I images and videos of the batch, V views (tiles and frames) of all of
them, S edge of a view in pixels. Images are flat over the batch, in the order of their placeholders:

    pixel_values         (V, 3, S, S)  float   views of every image: the whole image first, or the frames of a video
    image_layouts        (I, 9)        int64   what becomes of their patches, see `ImageLayout`

`forward` never lengthens a sequence.
"""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM, Qwen2Model, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..visual_tokens import VisualBackbone, VisualCausalLM
from .configuration import LlavaQwenConfig
from .layout import NUM_LAYOUT_FIELDS, ImageLayout


class VisionTower(nn.Module):
    """Holds the SigLIP encoder under the name it has in the published checkpoints."""

    def __init__(self, encoder: SiglipVisionModel) -> None:
        super().__init__()
        self.vision_tower = encoder

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """`(V, 3, S, S)` to `(V, P, C)`: patches of the last stored layer."""
        encoder = self.vision_tower
        return encoder.encoder(inputs_embeds=encoder.embeddings(views)).last_hidden_state


class LlavaQwenModel(VisualBackbone, Qwen2Model):
    """The Qwen2 backbone with encoder, projector and newline; see the module for the image arguments."""

    config_class = LlavaQwenConfig
    _no_split_modules: ClassVar = ["Qwen2DecoderLayer", "SiglipEncoderLayer"]
    image_inputs = ("pixel_values", "image_layouts")

    def __init__(self, config: LlavaQwenConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(SiglipVisionModel(config.vision_config))
        self.mm_projector = _projector(config)
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size) / math.sqrt(config.hidden_size))
        self.post_init()

    def get_image_features(
        self, *, pixel_values: torch.Tensor, image_layouts: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """Encodes images. `pooler_output` is a tuple: for every image its visual tokens `(n, D)`,
        n as the processor counts.

        Raises ValueError where layouts and views do not belong together.
        """
        layouts = [ImageLayout(*row) for row in image_layouts.tolist()]
        num_views = [layout.num_views for layout in layouts]
        if sum(num_views) != len(pixel_values):
            raise ValueError(f"image_layouts speak of {sum(num_views)} views, pixel_values hold {len(pixel_values)}")
        tokens_VPD = self.mm_projector(self.vision_tower(pixel_values.to(self.dtype)))
        features = tuple(
            self._arrange(views, layout) for views, layout in zip(tokens_VPD.split(num_views), layouts, strict=True)
        )
        return BaseModelOutputWithPooling(last_hidden_state=tokens_VPD, pooler_output=features)

    def _arrange(self, views_VPD: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        """The views of one image or video in the order of its placeholders: `(n, D)`."""
        newline = self.image_newline.to(views_VPD.dtype)[None]
        side = math.isqrt(views_VPD.shape[1])
        if layout.num_frames:
            maps = _resize(views_VPD.unflatten(1, (side, side)), layout.rows, layout.columns)
            return torch.cat((maps.flatten(0, 2), newline))
        if not layout.tile_rows:
            return torch.cat((views_VPD[0], newline))
        tiles = views_VPD[1:].view(layout.tile_rows, layout.tile_columns, side, side, -1)
        whole = tiles.transpose(1, 2).reshape(layout.tile_rows * side, layout.tile_columns * side, -1)
        kept = whole[None, layout.top : layout.bottom, layout.left : layout.right]
        token_map = _resize(kept, layout.rows, layout.columns)[0]
        rows = torch.cat((token_map, newline.expand(layout.rows, 1, -1)), dim=1)
        return torch.cat((views_VPD[0], rows.flatten(0, 1)))

    def dummy_image_inputs(self) -> dict[str, torch.Tensor]:
        """The smallest image inputs: for processes that have no image of their own, whose collectives must match."""
        edge = self.config.vision_config.image_size
        return {
            "pixel_values": torch.zeros(1, 3, edge, edge, device=self.device),
            "image_layouts": torch.zeros(1, NUM_LAYOUT_FIELDS, dtype=torch.int64, device=self.device),
        }


class LlavaQwenForCausalLM(VisualCausalLM, Qwen2ForCausalLM):
    """LLaVA-OneVision with its language-model head; named as the published checkpoints name it."""

    config_class = LlavaQwenConfig
    backbone_class = LlavaQwenModel
    unused_modules = ("model.vision_tower.vision_tower.post_layernorm", "model.vision_tower.vision_tower.head")


def _projector(config: LlavaQwenConfig) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(config.vision_config.hidden_size, config.hidden_size)]
    for _ in range(1, config.projector_depth):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def _resize(maps: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`(n, H, W, D)` resized bilinearly to `(n, rows, columns, D)`; unchanged where it has that size."""
    if maps.shape[1:3] == (rows, columns):
        return maps
    return F.interpolate(maps.permute(0, 3, 1, 2), (rows, columns), mode="bilinear").permute(0, 2, 3, 1)
