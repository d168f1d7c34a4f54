"""A Llama that reads pictures: what Valley 1 and 360VL have in common.

Token ids and pictures in, hidden states and logits out. A family says how its pictures become visual tokens
(`get_image_features`); where they go is the business of `visual_tokens`.

Shapes: B sequences, L tokens, D text width, I images of the batch, P pictures of all images, S their edge in pixels. An
image is what stands at one place of the text and is made of one or more pictures: the frames of a video, the crops of a
photograph. Images are flat over the batch, in the order of their places:

    pixel_values        (P, 3, S, S)  float
    pictures_per_image  (I,)          int64   sums to P

`forward` never lengthens a sequence.
"""

from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaModel

from .visual_tokens import VisualBackbone, VisualCausalLM


class ImageLlamaModel(VisualBackbone, LlamaModel):
    """The Llama backbone with visual tokens in the place of placeholders; see the module for the image arguments."""

    image_inputs = ("pixel_values", "pictures_per_image")
    num_dummy_pictures = 1

    def dummy_image_inputs(self) -> dict[str, torch.Tensor]:
        """The smallest image inputs: for processes that have no image of their own, whose collectives must match."""
        side, count = self.config.vision_config.image_size, self.num_dummy_pictures
        return {
            "pixel_values": torch.zeros(count, 3, side, side, device=self.device),
            "pictures_per_image": torch.tensor([count], device=self.device),
        }


class ImageLlamaForCausalLM(VisualCausalLM, LlamaForCausalLM):
    """The backbone of a family, `backbone_class`, with its language-model head."""

    # Buffers that transformers 4 stored.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"embeddings\.position_ids"]  # noqa: RUF012


def unused_clip_layers(config: Any, prefix: str) -> tuple[str, ...]:
    """Names of what lies behind the hidden state of CLIP that is read, under the tower's name.

    >>> from types import SimpleNamespace as Config
    >>> unused_clip_layers(Config(mm_vision_select_layer=-2, vision_config=Config(num_hidden_layers=24)), "tower")
    ('tower.post_layernorm', 'tower.encoder.layers.23')
    """
    num_layers, chosen = config.vision_config.num_hidden_layers, config.mm_vision_select_layer
    first_unused = chosen if chosen >= 0 else num_layers + 1 + chosen
    layers = (f"{prefix}.encoder.layers.{index}" for index in range(first_unused, num_layers))
    return (f"{prefix}.post_layernorm", *layers)
