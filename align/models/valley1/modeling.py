"""Token ids and frames in, hidden states and logits out: Valley 1 on transformers' Llama and CLIP (arXiv 2306.07207).

An image is a video or one picture or several: T pictures. Each goes through CLIP and a linear projection. Of the 256
patch tokens of the T pictures one set is made by pooling over time, and the T class tokens follow it, so an image has
256 + T visual tokens; they replace `<im_patch>` and `<vi_frame>` tokens of the text.

For the image arguments see `image_llama`. The original keeps text embeddings where placeholders and frames do not fit
each other; here that raises.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ChineseCLIPVisionModel, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..image_llama import ImageLlamaForCausalLM, ImageLlamaModel, unused_clip_layers
from .configuration import ChineseValleyConfig, ValleyLlamaConfig

MAX_FRAMES = 2048
DELTA_HEADS, DELTA_WIDTH, DELTA_DROPOUT = 8, 2048, 0.1


class DeltaEncoder(nn.Module):
    """One layer under the name it has in an nn.TransformerEncoder, which would copy it:
    ZeRO-3's parts cannot be copied."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """One encoder layer over frames, `(B, T, W)` to the same."""
        layer: Any = self.layers[0]
        # Attention keeps its dropout as a number, which whoever sets all nn.Dropout to 0, as DPO does, would not find.
        layer.self_attn.dropout = layer.dropout1.p
        return layer(sequences)


class ValleyLlamaModel(ImageLlamaModel):
    """The Llama backbone with CLIP, its projection and what the pooling needs."""

    config_class = ValleyLlamaConfig
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "ChineseCLIPVisionLayer"]  # noqa: RUF012

    def __init__(self, config: ValleyLlamaConfig) -> None:
        super().__init__(config)
        tower_class = ChineseCLIPVisionModel if config.is_chinese else CLIPVisionModel
        self.vision_tower = tower_class(config.vision_config)
        self.mm_projector = nn.Linear(config.mm_hidden_size, config.hidden_size)
        if config.pooling == "importance":
            self.pooling_layer = nn.Linear(config.hidden_size * config.num_patches, 1)
        if config.pooling == "delta":
            self._add_delta_encoder(config.hidden_size)
        self.post_init()

    def _add_delta_encoder(self, width: int) -> None:
        """The parts of delta pooling, under their names in the checkpoints, a misspelt one among them.

        The original made its encoder from a layer that it also kept, so every checkpoint holds that unused copy.
        """

        def layer() -> nn.TransformerEncoderLayer:
            return nn.TransformerEncoderLayer(width, DELTA_HEADS, DELTA_WIDTH, DELTA_DROPOUT, batch_first=True)

        self.position_matrix = nn.Parameter(torch.zeros(MAX_FRAMES, width))
        self.transformer_delta_encoder = DeltaEncoder(layer())
        self.transforemr_adding_layer = layer()

    def placeholders(self, num_pictures: int) -> list[int | None]:
        """The tokens that stand for an image of so many pictures, without the four that wrap them."""
        config = self.config
        return [config.image_token_id] * config.num_patches + [config.video_token_id] * num_pictures

    def places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, L)` bool: where images and frames go."""
        kinds = [self.config.image_token_id, self.config.video_token_id]
        if None in kinds:
            raise ValueError(
                "found neither in config.json nor in tokenizer files beside it the ids of the image tokens"
            )
        return torch.isin(input_ids, torch.tensor(kinds, device=input_ids.device))

    def embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        past_key_values: Any,
        image_features: torch.Tensor | None,
        **image_inputs: Any,
    ) -> torch.Tensor:
        """As in the base, after a look at the order of the placeholders, which their number alone does not tell."""
        counts = image_inputs.get("pictures_per_image")
        if counts is not None and image_features is None and input_ids is not None:
            expected = [token for count in counts.tolist() for token in self.placeholders(count)]
            found = input_ids[self.places(input_ids)].tolist()
            if found != expected:
                raise ValueError(
                    f"expected for {len(counts)} images of {counts.tolist()} pictures {len(expected)} placeholders,"
                    f" first the patches of an image, then its frames; found {len(found)}, of which"
                    f" {found.count(self.config.video_token_id)} frames; was the sequence truncated?"
                )
        return super().embed(input_ids, inputs_embeds, past_key_values, image_features, **image_inputs)

    def get_image_features(
        self, pixel_values: torch.Tensor, pictures_per_image: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """Encodes images. `pooler_output` is a tuple: for every image of T pictures its visual tokens `(256 + T,
        D)`."""
        hidden = self.vision_tower(pixel_values.to(self.dtype), output_hidden_states=True).hidden_states
        tokens_PND = self.mm_projector(hidden[self.config.mm_vision_select_layer])
        images = tokens_PND.split(pictures_per_image.tolist())
        features = tuple(torch.cat((self.pool(tokens[:, 1:]), tokens[:, 0])) for tokens in images)
        return BaseModelOutputWithPooling(last_hidden_state=tokens_PND, pooler_output=features)

    def pool(self, patches_TND: torch.Tensor) -> torch.Tensor:
        """The patches of T frames to one set: `(T, N, D)` to `(N, D)`."""
        pooling = self.config.pooling
        if pooling == "importance":
            scores_T1 = self.pooling_layer(patches_TND.flatten(1))
            return (F.softmax(scores_T1, dim=0)[:, :, None] * patches_TND).sum(dim=0)
        mean_ND = patches_TND.mean(dim=0)
        if pooling == "delta":
            return mean_ND + self._delta(patches_TND.transpose(0, 1))
        return mean_ND

    def _delta(self, patches_NTD: torch.Tensor) -> torch.Tensor:
        """What the last frame tells beyond the mean: every patch position is a sequence over time, `(N, T,
        D)` to `(N, D)`."""
        num_frames = patches_NTD.shape[1]
        if num_frames > MAX_FRAMES:
            raise ValueError(f"expected at most {MAX_FRAMES} frames, found {num_frames}")
        return self.transformer_delta_encoder(patches_NTD + self.position_matrix[:num_frames])[:, -1]


class ValleyLlamaForCausalLM(ImageLlamaForCausalLM):
    """Valley 1 with its language-model head; named as the published checkpoints name it."""

    config_class: type[ValleyLlamaConfig] = ValleyLlamaConfig
    backbone_class = ValleyLlamaModel

    @property
    def unused_modules(self) -> tuple[str, ...]:  # type: ignore[override]
        """What is stored and gets no gradient; the table of positions is a constant in the original too."""
        delta = ("model.position_matrix", "model.transforemr_adding_layer")
        return (*unused_clip_layers(self.config, "model.vision_tower"), *delta)


class LlavaLlamaForCausalLM(ValleyLlamaForCausalLM):
    """Chinese-Valley: the same with Chinese-CLIP, under the architecture's name in its checkpoints."""

    config_class = ChineseValleyConfig
