"""Token ids and image tensors in, hidden states and logits out: Valley-Eagle on transformers' Qwen2,
SigLIP and Qwen2-VL.

Two encoders see every image. SigLIP sees square tiles, which a convolutional projector turns into words of a "visual
vocabulary" (Ovis, arXiv 2405.20797); the Qwen2-VL encoder sees the whole image at its own resolution (Eagle, arXiv
2408.15998). Their tokens replace the image's placeholders; positions are plain 1-D rotary over the whole sequence.

Shapes: B sequences, L tokens, D text width, I images of the batch, T tiles of all images, S tile edge in pixels,
N Qwen2-VL patches of all images. Images are flat over the batch, in the order of their placeholders; a sequence with
n placeholder runs takes the next n images:

    pixel_values         (T, 3, S, S)  float   SigLIP tiles
    tiles_per_image      (I,)          int64   sums to T; the first tile of an image is the whole image
    image_sizes          (I, 2)        int64   original width and height in pixels
    eagle_pixel_values   (N, 1176)     float   Qwen2-VL patches in 2 x 2-merge order
    image_grid_thw       (I, 3)        int64   frames, rows, columns of patches; products sum to N

`forward` never lengthens a sequence. What the original offers beyond images (video arguments, navit-only encoders,
token compressors) is left out.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2ForCausalLM, Qwen2Model, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from ..visual_tokens import VisualBackbone, VisualCausalLM
from .configuration import ValleyEagleConfig

SIGLIP_INPUTS = ("pixel_values", "tiles_per_image", "image_sizes")
EAGLE_INPUTS = ("eagle_pixel_values", "image_grid_thw")


class VisualVocabulary(nn.Embedding):
    """An embedding that is looked up with a distribution over its rows instead of an index.

    The product stands in a forward of its own so that ZeRO-3 and FSDP gather the weight for it.
    """

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        """`(N, T, V)` probabilities to `(N, T, H)` embeddings."""
        return probabilities @ self.weight


class OvisConvAdapter(nn.Module):
    """SigLIP patches -> stride-2 convolution -> distribution over visual words -> their expected embedding."""

    def __init__(self, config: ValleyEagleConfig) -> None:
        super().__init__()
        width, words = config.vision_config.hidden_size, config.mlp_hidden_dim or config.hidden_size
        self.tokenize_function = config.tokenize_function
        self.softmax_dtype = torch.float32 if config.projector_softmax_fp32 else None
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1)
        self.mlp = nn.Sequential(nn.Linear(width, words, bias=False), nn.LayerNorm(words))
        self.embedding = VisualVocabulary(words, config.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(T, P, C)` patches of square tiles, row by row, to `(T, P', D)` tokens, P' about a quarter of P."""
        logits = self.mlp(_convolve(self.conv, patches))
        words = F.softmax(logits, dim=-1, dtype=self.softmax_dtype).to(logits.dtype)
        if self.tokenize_function == "st_argmax":
            hard = F.one_hot(words.argmax(dim=-1), words.shape[-1]).to(words.dtype)
            words = hard - words.detach() + words
        return self.embedding(words)


class ConvAdapter(nn.Module):
    """SigLIP patches -> two-layer perceptron -> stride-2 convolution at the text model's width."""

    def __init__(self, config: ValleyEagleConfig) -> None:
        super().__init__()
        self.mlp = _perceptron(config.vision_config.hidden_size, config)
        self.conv = nn.Conv2d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(N, T, W)` patches to fewer `(N, T2, H)`."""
        return _convolve(self.conv, self.mlp(patches))


class PixelShuffle(nn.Module):
    """Blocks of r x r neighbouring SigLIP patches laid side by side -> two-layer perceptron."""

    def __init__(self, config: ValleyEagleConfig) -> None:
        super().__init__()
        self.ratio = config.pixelshuffle_downsample_ratio
        self.mlp = _perceptron(config.vision_config.hidden_size * self.ratio**2, config)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(N, T, W)` patches to a fourth as many, wider ones."""
        num_tiles, num_patches, width = patches.shape
        blocks = round(num_patches**0.5) // self.ratio
        grid = patches.view(num_tiles, blocks, self.ratio, blocks, self.ratio, width)
        return self.mlp(grid.transpose(2, 3).reshape(num_tiles, blocks * blocks, -1))


PROJECTORS: dict[str, type[nn.Module]] = {
    "ovis_conv_adapter": OvisConvAdapter,
    "conv_adapter": ConvAdapter,
    "mlp_pixel_shuffle": PixelShuffle,
}


class SiglipTower(nn.Module):
    """Holds the SigLIP encoder under the name it has in the published checkpoints."""

    def __init__(self, encoder: SiglipVisionModel) -> None:
        super().__init__()
        self.vision_tower = encoder

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """`(N, 3, S, S)` tiles to `(N, T, W)` patches."""
        return self.vision_tower(tiles).last_hidden_state


class ValleyQwen2Model(VisualBackbone, Qwen2Model):
    """The Qwen2 backbone with both encoders and the projector; see the module for the image arguments."""

    config_class = ValleyEagleConfig
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "Qwen2VLVisionBlock"]  # noqa: RUF012
    image_inputs: tuple[str, ...] = (*SIGLIP_INPUTS, *EAGLE_INPUTS)
    encoder_configs = ("vision_config", "eagle_vision_config")

    def __init__(self, config: ValleyEagleConfig) -> None:
        super().__init__(config)
        self.geometry = config.geometry()
        self.vision_tower = SiglipTower(SiglipVisionModel(config.vision_config))
        if config.eagle_vision_config is None:
            self.image_inputs = SIGLIP_INPUTS
        else:
            self.qwen2vl_vision_tower = Qwen2VisionTransformerPretrainedModel(config.eagle_vision_config)
        self.mm_projector = PROJECTORS[config.mm_projector_type](config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        tiles_per_image: torch.Tensor,
        image_sizes: torch.Tensor,
        eagle_pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encodes images. `pooler_output` is a tuple: for every image its visual tokens `(n, D)`,
        n as the processor counts."""
        patches = self.vision_tower(pixel_values.to(self.dtype))
        if self.gradient_checkpointing and self.training:
            tokens_TPD = checkpoint(self.mm_projector, patches, use_reentrant=False)
        else:
            tokens_TPD = self.mm_projector(patches)
        features = [
            self._arrange(tokens, width, height)
            for tokens, (width, height) in zip(
                tokens_TPD.split(tiles_per_image.tolist()), image_sizes.tolist(), strict=True
            )
        ]
        if self.geometry.eagle:
            assert eagle_pixel_values is not None
            assert image_grid_thw is not None
            encoded = self.qwen2vl_vision_tower(
                eagle_pixel_values.to(self.dtype), grid_thw=image_grid_thw
            ).pooler_output
            pairs = zip(features, encoded.split(self.geometry.eagle.counts(image_grid_thw)), strict=True)
            features = [torch.cat(pair) for pair in pairs]
        return BaseModelOutputWithPooling(last_hidden_state=tokens_TPD, pooler_output=tuple(features))

    def _arrange(self, tokens_TPD: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """The tiles of one image in the order of its placeholders, without those that show padding: `(n, D)`."""
        num_tiles, side = len(tokens_TPD), self.geometry.tokens_per_side
        if not self.geometry.eagle:
            pooled = self.geometry.pooled_side(num_tiles)
            return _pool(tokens_TPD.unflatten(1, (side, side)), pooled, pooled).flatten(0, 2)
        if num_tiles == 1:
            return tokens_TPD[0]
        columns, rows = self.geometry.grid(width, height)
        if num_tiles != 1 + columns * rows:
            raise ValueError(f"expected {1 + columns * rows} tiles for an image of {width}x{height}, found {num_tiles}")
        tiles = tokens_TPD[1:].view(rows, columns, side, side, -1)
        token_map = tiles.transpose(1, 2).reshape(rows * side, columns * side, -1)
        kept_rows, kept_columns = self.geometry.map_window(width, height)
        kept = token_map[kept_rows, kept_columns]
        return torch.cat((tokens_TPD[0], _pool(kept[None], *self.geometry.map_size(width, height))[0].flatten(0, 1)))

    def dummy_image_inputs(self) -> dict[str, torch.Tensor]:
        """The smallest image inputs: for processes that have no image of their own, whose collectives must match."""
        geometry, device = self.geometry, self.device
        inputs = {
            "pixel_values": torch.zeros(1, 3, geometry.crop_px, geometry.crop_px, device=device),
            "tiles_per_image": torch.ones(1, dtype=torch.int64, device=device),
            "image_sizes": torch.ones(1, 2, dtype=torch.int64, device=device),
        }
        if geometry.eagle:
            inputs["eagle_pixel_values"], inputs["image_grid_thw"] = geometry.eagle.blank(device)
        return inputs


class ValleyQwen2ForCausalLM(VisualCausalLM, Qwen2ForCausalLM):
    """Valley-Eagle with its language-model head; named as the published checkpoints name it."""

    config_class = ValleyEagleConfig
    backbone_class = ValleyQwen2Model
    # The pooling head is stored but never used, and a small encoder may be configured without it.
    unused_modules = ("model.vision_tower.vision_tower.head",)


def _perceptron(width: int, config: ValleyEagleConfig) -> nn.Sequential:
    hidden = config.mlp_hidden_dim or config.hidden_size
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, config.hidden_size))


def _convolve(conv: nn.Conv2d, patches: torch.Tensor) -> torch.Tensor:
    """A convolution over patches of square tiles, `(T, P, C)` row by row, in and out."""
    side = round(patches.shape[1] ** 0.5)
    return conv(patches.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


def _pool(maps: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`(n, H, W, D)` averaged to `(n, rows, columns, D)`; unchanged where it has that size."""
    if maps.shape[1:3] == (rows, columns):
        return maps
    return F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), (rows, columns)).permute(0, 2, 3, 1)
