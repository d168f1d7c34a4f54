"""Token ids and five crops an image in, hidden states and logits out: 360VL on transformers' Llama and CLIP.

An image is seen as its four quarters and as a whole, each as large as CLIP takes it. One C-Abstractor reads the
quarters, put together or one by one, another the whole; their tokens, in this order, replace the image's placeholders.
Where the checkpoint has a third C-Abstractor, an image can be a single picture that this one reads.

For the image arguments see `image_llama`; an image has five pictures: top left, top right, bottom left, bottom right,
whole; or one.
"""

from math import isqrt
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..image_llama import ImageLlamaForCausalLM, ImageLlamaModel, unused_clip_layers
from .abstractor import CAbstractor
from .configuration import QH360VLConfig

NUM_PICTURES = 5


class ClipTower(nn.Module):
    """Holds the CLIP encoder under the name it has in the published checkpoints."""

    def __init__(self, config: QH360VLConfig) -> None:
        super().__init__()
        self.select_layer = config.mm_vision_select_layer
        self.vision_tower = CLIPVisionModel(config.vision_config)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """`(P, 3, S, S)` to patches `(P, L, E)`, without the class token."""
        return self.vision_tower(pictures, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]


class QH360VLModel(ImageLlamaModel):
    """The Llama backbone with CLIP and the projectors."""

    config_class = QH360VLConfig
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "CAbstractor"]  # noqa: RUF012

    def __init__(self, config: QH360VLConfig) -> None:
        super().__init__(config)
        self.vision_tower = ClipTower(config)
        num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2

        def projector() -> CAbstractor:
            return CAbstractor(config.projector, num_patches, config.hidden_size)

        if config.has_crop_projectors:
            self.mm_projector_ctt, self.mm_projector_ori = projector(), projector()
        if config.has_single_projector:
            self.mm_projector = projector()
        self.post_init()

    @property
    def num_dummy_pictures(self) -> int:  # type: ignore[override]
        """Pictures of an image as the model is trained."""
        return 1 if self.config.single_picture else NUM_PICTURES

    def get_image_features(
        self, pixel_values: torch.Tensor, pictures_per_image: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """Encodes images. `pooler_output` is a tuple: for every image its visual tokens `(n, D)`.

        Raises ValueError where images have neither five pictures nor one, or what the checkpoint has no projector for.
        """
        counts = set(pictures_per_image.tolist())
        known = [NUM_PICTURES] * self.config.has_crop_projectors + [1] * self.config.has_single_projector
        if len(counts) != 1 or not counts <= set(known):
            raise ValueError(
                f"expected {' or '.join(map(str, known))} pictures per image, the same in a batch, "
                f"found {pictures_per_image.tolist()}"
            )
        patches_PLE = self.vision_tower(pixel_values.to(self.dtype))
        tokens_IND = self.mm_projector(patches_PLE) if counts == {1} else self._of_crops(patches_PLE)
        return BaseModelOutputWithPooling(last_hidden_state=tokens_IND, pooler_output=tuple(tokens_IND))

    def _of_crops(self, patches_PLE: torch.Tensor) -> torch.Tensor:
        """Visual tokens `(I, n, D)` of images of five crops each."""
        patches_IPLE = patches_PLE.unflatten(0, (-1, NUM_PICTURES))
        quarters, whole = patches_IPLE[:, :-1], patches_IPLE[:, -1]
        if self.config.joins_crops:
            details = self.mm_projector_ctt(_join_quarters(quarters))
        else:
            details = self.mm_projector_ctt(quarters.flatten(0, 1)).unflatten(0, (-1, NUM_PICTURES - 1)).flatten(1, 2)
        return torch.cat((details, self.mm_projector_ori(whole)), dim=1)


class QH360_VL_LlamaForCausalLM(ImageLlamaForCausalLM):
    """360VL with its language-model head; named as the published checkpoints name it."""

    config_class = QH360VLConfig
    backbone_class = QH360VLModel

    @property
    def unused_modules(self) -> tuple[str, ...]:  # type: ignore[override]
        """What is stored and gets no gradient."""
        single = self.config.single_picture
        projectors = ("model.mm_projector_ctt", "model.mm_projector_ori") if single else ("model.mm_projector",)
        return (*unused_clip_layers(self.config, "model.vision_tower.vision_tower"), *projectors)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the end of a turn ends a response too,
        which the published generation config leaves out."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        add_end_of_turn(model)
        return loaded


def add_end_of_turn(model: Any) -> None:
    """Adds the id of `<|eot_id|>` to what ends a response."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if model.config.eot_token_id is not None and model.config.eot_token_id not in ends:
        model.generation_config.eos_token_id = [*ends, model.config.eot_token_id]


def _join_quarters(quarters_IQLE: torch.Tensor) -> torch.Tensor:
    """Patches of the four quarters `(I, 4, L, E)` as those of one picture, `(I, 4 * L, E)` row by row."""
    side = isqrt(quarters_IQLE.shape[2])
    grid = quarters_IQLE.unflatten(2, (side, side)).unflatten(1, (2, 2))
    return grid.transpose(2, 3).reshape(len(quarters_IQLE), 4 * side * side, -1)
