"""A grid of patches in, a fixed number of visual tokens out: the C-Abstractor of Honeybee (arXiv 2312.06742).

Convolution blocks, pooling, convolution blocks, a perceptron. Blocks are those of RegNet with squeeze-and-excitation
(arXiv 2003.13678) and a LayerNorm over channels; its epsilon is 1e-5 whatever timm's default is today. Modules are
named as in the checkpoints.
"""

from collections import OrderedDict
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F

from .configuration import AbstractorConfig


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps `(B, C, H, W)`."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)`, normalised over channels."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Module):
    """A convolution without bias, then a norm."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel_size: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(num_inputs, num_outputs, kernel_size, padding=padding, groups=groups, bias=False)
        self.bn = ChannelNorm(num_outputs, eps=1e-5)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Convolution and norm, `(N, C, H, W)`."""
        return self.bn(self.conv(maps))


class SqueezeExcite(nn.Module):
    """Weighs channels by what their means say."""

    def __init__(self, num_channels: int, num_squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(num_channels, num_squeezed, 1)
        self.fc2 = nn.Conv2d(num_squeezed, num_channels, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Channels weighted by their means, `(N, C, H, W)`."""
        means = maps.mean(dim=(2, 3), keepdim=True)
        return maps * torch.sigmoid(self.fc2(F.silu(self.fc1(means))))


class Block(nn.Module):
    """1 x 1, depthwise 3 x 3, squeeze-and-excitation, 1 x 1, and a shortcut around them."""

    def __init__(self, num_inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(num_inputs, width)
        self.conv2 = NormedConv(width, width, kernel_size=3, groups=width)
        self.se = SqueezeExcite(width, round(num_inputs / 4))
        self.conv3 = NormedConv(width, width)
        if num_inputs != width:
            self.downsample = NormedConv(num_inputs, width)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """A residual block, `(N, C, H, W)`."""
        inner = F.silu(self.conv2(F.silu(self.conv1(maps))))
        shortcut = self.downsample(maps) if hasattr(self, "downsample") else maps
        return F.silu(self.conv3(self.se(inner)) + shortcut)


class CAbstractor(nn.Module):
    """`(B, L, E)` patches of square grids, row by row, to `(B, num_queries, D)`, D the text model's width.

    `num_patches`: of the grid that the position table was trained for; other grids get it interpolated.
    """

    def __init__(self, config: AbstractorConfig, num_patches: int, text_width: int) -> None:
        super().__init__()
        encoder_width, width = config.encoder_hidden_size, config.hidden_size
        if config.pos_emb:
            # The first row belongs to the class token, which is not read.
            self.pos_emb = nn.Parameter(torch.zeros(1, num_patches + 1, encoder_width))
        if config.num_eos_tokens:
            self.eos_tokens = nn.Parameter(torch.zeros(1, config.num_eos_tokens, text_width))
        if config.prenorm:
            self.prenorm = nn.LayerNorm(encoder_width)
        self.net = nn.Sequential(
            _stage(config.depth, encoder_width, width),
            nn.AdaptiveAvgPool2d(isqrt(config.num_queries)),
            _stage(config.depth, width, width),
        )
        layers: list[nn.Module] = [nn.Linear(width, text_width)]
        for _ in range(config.mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(text_width, text_width)]
        self.readout = nn.Sequential(*layers)

    def forward(self, patches_BLE: torch.Tensor) -> torch.Tensor:
        """`(B, L, E)` patches to the fewer tokens of the text model."""
        if hasattr(self, "prenorm"):
            patches_BLE = self.prenorm(patches_BLE)
        side = isqrt(patches_BLE.shape[1])
        if hasattr(self, "pos_emb"):
            patches_BLE = patches_BLE + self._positions(side)
        maps = patches_BLE.transpose(1, 2).unflatten(2, (side, side))
        tokens = self.readout(self.net(maps).flatten(2).transpose(1, 2))
        if hasattr(self, "eos_tokens"):
            tokens = torch.cat((tokens, self.eos_tokens.expand(len(tokens), -1, -1)), dim=1)
        return tokens

    def _positions(self, side: int) -> torch.Tensor:
        """The position table for a grid of this side, `(1, side * side, E)`."""
        table = self.pos_emb[:, 1:]
        trained_side = isqrt(table.shape[1])
        if side == trained_side:
            return table
        grid = table.float().transpose(1, 2).unflatten(2, (trained_side, trained_side))
        resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(table.dtype)


def _stage(depth: int, num_inputs: int, width: int) -> nn.Sequential:
    blocks = [Block(num_inputs if index == 0 else width, width) for index in range(depth)]
    return nn.Sequential(OrderedDict((f"b{index}", block) for index, block in enumerate(blocks, start=1)))
