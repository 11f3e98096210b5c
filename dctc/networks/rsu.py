"""What both U2-Nets are made of: residual U-blocks, an encoder and a decoder of them (Qin et al., 2020).

A residual U-block is a small U-Net of its own whose output is added to its input. The decoder has a side output at each
of six scales and a fused one; all are logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dctc.networks.block import Block
from dctc.networks.channel_attention import ChannelAttention
from dctc.networks.unet import make_norm

REFERENCE_WIDTH = 64  # the width at which the channels are the authors'
FEWEST = 4  # channels, however narrow the network: group norm needs as many in a group


@dataclass(frozen=True)
class Stage:
    """One residual U-block: its depth (0 is the dilated one without pooling), inner and outer channels at width 64."""

    depth: int
    inner: int
    outer: int


def scaled(channels: int, width: int) -> int:
    """Channels at ``width``."""
    return max(FEWEST, channels * width // REFERENCE_WIDTH)


def _layer(inputs: int, outputs: int, norm: str, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
    return nn.Sequential(convolution, make_norm(norm, outputs), nn.ReLU(inplace=True))


def _resized(image: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(image, size=like.shape[-2:], mode="bilinear", align_corners=False)


class ResidualUBlock(Block):
    """RSU-``depth``, or RSU-4F when ``depth`` is 0: dilations 1, 2, 4, 8 instead of pooling."""

    def __init__(self, depth: int, inputs: int, inner: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.pools = depth > 0
        downs = [1] * (depth - 1) + [2] if self.pools else [1, 2, 4, 8]  # dilations
        ups = [1] * (depth - 1) if self.pools else [4, 2, 1]
        self.entry = _layer(inputs, outputs, norm)
        self.downs = nn.ModuleList(
            _layer(inner if number else outputs, inner, norm, dilation) for number, dilation in enumerate(downs)
        )
        self.ups = nn.ModuleList(
            _layer(2 * inner, inner if number < len(ups) - 1 else outputs, norm, dilation)
            for number, dilation in enumerate(ups)
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B,inputs,H,W] to [B,outputs,H,W], for any H and W."""
        entry: Tensor = self.entry(images)
        maps: list[Tensor] = []
        current = entry
        for number, layer in enumerate(self.downs):
            if self.pools and 0 < number < len(self.downs) - 1:  # the last one is dilated instead
                current = F.max_pool2d(current, 2, ceil_mode=True)
            current = layer(current)
            maps.append(current)
        for layer, skip in zip(self.ups, reversed(maps[:-1]), strict=True):
            current = layer(torch.cat([_resized(current, skip) if self.pools else current, skip], dim=1))
        return current + entry


class U2Encoder(nn.Module):
    """Residual U-blocks with max-pooling in between; with ``attention`` each ends in channel attention."""

    def __init__(self, stages: Sequence[Stage], bands: int, width: int, norm: str, attention: bool) -> None:
        super().__init__()
        outer = [scaled(stage.outer, width) for stage in stages]
        self.blocks = nn.ModuleList(
            ResidualUBlock(stage.depth, inputs, scaled(stage.inner, width), outputs, norm)
            for stage, inputs, outputs in zip(stages, [bands, *outer], outer, strict=False)
        )
        self.attention = nn.ModuleList(ChannelAttention(c) if attention else nn.Identity() for c in outer)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B,bands,H,W] to one feature map a stage, finest first; odd sizes are rounded up by the pools."""
        features: list[Tensor] = []
        current = images
        for block, attention in zip(self.blocks, self.attention, strict=True):
            if features:
                current = F.max_pool2d(current, 2, ceil_mode=True)
            current = attention(block(current))
            features.append(current)
        return features


class U2Decoder(nn.Module):
    """Residual U-blocks up, a side output at each scale, a fused one of all.

    Args:
        stages: of the decoder, coarsest first.
        encoder: outer channels of the encoder's stages at width 64, finest first.
    """

    def __init__(self, stages: Sequence[Stage], encoder: Sequence[int], classes: int, width: int, norm: str) -> None:
        super().__init__()
        skips = [scaled(channels, width) for channels in encoder]
        outer = [skips[-1], *(scaled(stage.outer, width) for stage in stages)]
        self.blocks = nn.ModuleList(
            ResidualUBlock(stage.depth, below + skip, scaled(stage.inner, width), outputs, norm)
            for stage, below, skip, outputs in zip(stages, outer, reversed(skips[:-1]), outer[1:], strict=False)
        )
        self.sides = nn.ModuleList(nn.Conv2d(channels, classes, 3, padding=1) for channels in reversed(outer))
        self.head = nn.Conv2d(len(self.sides) * classes, classes, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
        """Feature maps of :class:`U2Encoder` to logits [B,classes,H,W], ``size`` = (H, W).

        In evaluation mode the fused ones alone; in training mode a tuple, the fused ones first and then the side
        outputs, finest first, each of the image's size: the loss is the sum over all of them.
        """
        maps = [features[-1]]
        for block, skip in zip(self.blocks, reversed(features[:-1]), strict=True):
            maps.append(block(torch.cat([_resized(maps[-1], skip), skip], dim=1)))
        finest = maps[-1]
        sides = [_resized(side(m), finest) for side, m in zip(self.sides, reversed(maps), strict=True)]
        fused: Tensor = self.head(torch.cat(sides, dim=1))
        assert tuple(fused.shape[-2:]) == tuple(size)
        return (fused, *sides) if self.training else fused
