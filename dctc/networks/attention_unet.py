"""Attention U-Net in two halves: a U-Net whose skips pass an additive gate (Oktay et al., 2018).

``skip' = sigmoid(BN(1x1(ReLU(BN(1x1 g) + BN(1x1 skip))))) * skip``, with g the decoder's features at that scale and
half of the skip's channels inside the gate. Convolutions have a bias, and the decoder goes up by nearest-neighbour
sampling and a 3x3 convolution: so the published implementations do, and so the parameter count is 34,878,898 at width
64 with 3 bands and 6 classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dctc.networks import unet
from dctc.networks.block import Block
from dctc.networks.unet import double_convolution, make_norm, stage_widths


class Encoder(unet.Encoder):
    """The U-Net's encoder with biases."""

    def __init__(self, bands: int, width: int, norm: str = "batch", attention: bool = False) -> None:
        super().__init__(bands, width, norm, attention, bias=True)


class Gate(nn.Module):
    """Weighs each pixel of a skip by what the decoder knows there."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.signal = nn.Sequential(nn.Conv2d(channels, inner, 1), make_norm(norm, inner))
        self.skip = nn.Sequential(nn.Conv2d(channels, inner, 1), make_norm(norm, inner))
        self.weight = nn.Sequential(nn.Conv2d(inner, 1, 1), make_norm(norm, 1), nn.Sigmoid())

    def forward(self, signal: Tensor, skip: Tensor) -> Tensor:
        """``skip`` [B,C,H,W] weighed by one number a pixel; ``signal`` has its shape."""
        weights: Tensor = self.weight(torch.relu(self.signal(signal) + self.skip(skip)))
        return weights * skip


class Decoder(nn.Module):
    """Up, gate, concatenate, convolve twice; a 1x1 convolution to logits."""

    def __init__(self, classes: int, width: int, norm: str = "batch") -> None:
        super().__init__()
        pairs = list(itertools.pairwise(stage_widths(width)[::-1]))
        self.ups = nn.ModuleList(
            Block(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(deep, shallow, 3, padding=1),
                make_norm(norm, shallow),
                nn.ReLU(inplace=True),
            )
            for deep, shallow in pairs
        )
        self.gates = nn.ModuleList(Gate(shallow, norm) for _, shallow in pairs)
        self.blocks = nn.ModuleList(double_convolution(deep, shallow, norm, bias=True) for deep, shallow in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Feature maps of :class:`Encoder` to logits [B,classes,H,W], cropped to ``size`` = (H, W) of the image."""
        current = features[-1]
        for up, gate, block, skip in zip(self.ups, self.gates, self.blocks, reversed(features[:-1]), strict=True):
            signal = up(current)
            current = block(torch.cat([gate(signal, skip), signal], dim=1))
        logits: Tensor = self.head(current)
        return logits[..., : size[0], : size[1]]
