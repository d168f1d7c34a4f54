"""Token ids and image patches in, hidden states and logits out: Valley2.5 on transformers' Qwen3 and Qwen2-VL encoder.

The encoder sees every image at its own resolution; a perceptron with a very wide hidden layer merges its patches two by
two. Positions are plain 1-D rotary over the whole sequence.

Shapes: B sequences, L tokens, D text width, C encoder width, I images of the batch, N patches of all images. Images are
flat over the batch, in the order of their placeholders:

    pixel_values    (N, 1176)  float   patches in 2 x 2-merge order
    image_grid_thw  (I, 3)     int64   frames, rows, columns of patches; products sum to N

`forward` never lengthens a sequence.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3ForCausalLM, Qwen3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from ..visual_tokens import VisualBackbone, VisualCausalLM
from .configuration import Valley25Config

MERGER_NORM_EPS = 1e-6


class WideMerger(nn.Module):
    """Patches of 2 x 2 blocks side by side through a perceptron with a hidden layer of its own width."""

    def __init__(self, config: Valley25Config) -> None:
        super().__init__()
        vision = config.eagle_vision_config
        self.width = vision.embed_dim * vision.spatial_merge_size**2
        hidden = config.navit_merger_hidden_dim
        self.ln_q = nn.LayerNorm(vision.embed_dim, eps=MERGER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(self.width, hidden), nn.GELU(), nn.Linear(hidden, vision.hidden_size))
        self.gradient_checkpointing = False

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(N, C)` in merge order to `(N / 4, D)`; recomputed in backward under gradient checkpointing,
        being so wide."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(self._merge, patches, use_reentrant=False)
        return self._merge(patches)

    def _merge(self, patches: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(patches).view(-1, self.width))


class ValleyQwen3Model(VisualBackbone, Qwen3Model):
    """The Qwen3 backbone with its encoder; see the module for the image arguments."""

    config_class = Valley25Config
    _no_split_modules: ClassVar = ["Qwen3DecoderLayer", "Qwen2VLVisionBlock"]
    image_inputs = ("pixel_values", "image_grid_thw")
    encoder_configs = ("eagle_vision_config",)

    def __init__(self, config: Valley25Config) -> None:
        super().__init__(config)
        self.qwen2vl_vision_tower = Qwen2VisionTransformerPretrainedModel(config.eagle_vision_config)
        self.qwen2vl_vision_tower.merger = WideMerger(config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """Encodes images. `pooler_output` is a tuple: for every image its visual tokens `(n, D)`,
        n as the processor counts."""
        encoded = self.qwen2vl_vision_tower(pixel_values.to(self.dtype), grid_thw=image_grid_thw)
        features = encoded.pooler_output.split(self.config.geometry().counts(image_grid_thw))
        return BaseModelOutputWithPooling(last_hidden_state=encoded.last_hidden_state, pooler_output=features)

    def dummy_image_inputs(self) -> dict[str, torch.Tensor]:
        """The smallest image inputs: for processes that have no image of their own, whose collectives must match."""
        patches, grid = self.config.geometry().blank(self.device)
        return {"pixel_values": patches, "image_grid_thw": grid}


class ValleyQwen3ForCausalLM(VisualCausalLM, Qwen3ForCausalLM):
    """Valley2.5 with its language-model head; named as the published checkpoint is taken to name it."""

    config_class = Valley25Config
    backbone_class = ValleyQwen3Model
