"""U-Net in two halves, so that students can share an encoder (method.md, "Networks").

Any band count, class count, width, height and width of the image: the encoder pads to the stride, the decoder crops.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dctc.networks.block import Block
from dctc.networks.channel_attention import ChannelAttention
from dctc.networks.encoder_decoder import EncoderDecoder

STAGES = 5
STRIDE = 2 ** (STAGES - 1)
NORMS = ("batch", "sync", "group")


def make_norm(kind: str, channels: int) -> nn.Module:
    """The normalisation layer of a block.

    Args:
        kind: ``batch`` (statistics of one rank), ``sync`` (of all ranks, CUDA only) or ``group`` (of one image, so the
            same on any number of ranks).
        channels: number of channels; ``group`` makes up to 32 groups of at least 4, because a group of one channel
            would lose that channel's level, and at the coarsest stage of a small tile everything.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "sync":
        return nn.SyncBatchNorm(channels)
    if kind == "group":
        return nn.GroupNorm(_groups(channels), channels)
    raise ValueError(f"unknown norm {kind!r}: choose one of {', '.join(NORMS)}")


def _groups(channels: int) -> int:
    return next(
        groups for groups in (32, 16, 8, 4, 2, 1) if (channels % groups == 0 and channels >= 4 * groups) or groups == 1
    )


def double_convolution(inputs: int, outputs: int, norm: str, bias: bool = False) -> Block:
    """(conv3x3, norm, ReLU) twice."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=bias),
            make_norm(norm, outputs),
            nn.ReLU(inplace=True),
        ]
    return Block(*layers)


def stage_widths(width: int) -> list[int]:
    """Channels of the five stages: ``width * (1, 2, 4, 8, 16)``."""
    return [width * 2**stage for stage in range(STAGES)]


def pad_to_stride(images: Tensor, stride: int = STRIDE) -> Tensor:
    """Repeat the last row and column until height and width are multiples of the stride.

    While torch.export looks on, without a branch on the size: one graph then serves all sizes.
    """
    height, width = images.shape[-2:]
    if torch.compiler.is_exporting():
        rows, columns = (
            torch.arange((size + stride - 1) // stride * stride, device=images.device).clamp(max=size - 1)
            for size in (height, width)
        )
        return images.index_select(-2, rows).index_select(-1, columns)
    down, right = -height % stride, -width % stride
    if not down and not right:
        return images
    return F.pad(images, (0, right, 0, down), mode="replicate")


class Encoder(nn.Module):
    """Five stages, each (conv3x3, norm, ReLU) twice, max-pooled in between.

    With ``attention`` each block ends in channel attention, before the pool and before the skip (the teacher).
    """

    def __init__(
        self, bands: int, width: int, norm: str = "batch", attention: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        widths = stage_widths(width)
        self.blocks = nn.ModuleList(
            double_convolution(inputs, outputs, norm, bias)
            for inputs, outputs in zip([bands, *widths], widths, strict=False)
        )
        self.attention = nn.ModuleList(
            ChannelAttention(channels) if attention else nn.Identity() for channels in widths
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B,bands,H,W] to five feature maps, finest first; the i-th has ``width * 2**i`` channels."""
        features: list[Tensor] = []
        current = pad_to_stride(images)
        for block, attention in zip(self.blocks, self.attention, strict=True):
            if features:
                current = F.max_pool2d(current, 2)
            current = attention(block(current))
            features.append(current)
        return features


class Decoder(nn.Module):
    """Transposed convolutions up, skip concatenation, a 1x1 convolution to logits."""

    def __init__(self, classes: int, width: int, norm: str = "batch") -> None:
        super().__init__()
        widths = stage_widths(width)[::-1]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(deep, shallow, 2, stride=2) for deep, shallow in itertools.pairwise(widths)
        )
        self.blocks = nn.ModuleList(
            double_convolution(deep, shallow, norm) for deep, shallow in itertools.pairwise(widths)
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Feature maps of :class:`Encoder` to logits [B,classes,H,W], cropped to ``size`` = (H, W) of the image."""
        current = features[-1]
        for up, block, skip in zip(self.ups, self.blocks, reversed(features[:-1]), strict=True):
            current = block(torch.cat([skip, up(current)], dim=1))
        logits: Tensor = self.head(current)
        whole = not torch.compiler.is_exporting() and logits.shape[-2:] == tuple(size)
        return logits if whole else logits[..., : size[0], : size[1]]


class UNet(EncoderDecoder):
    """Encoder and decoder as one module: the supervised baseline and, with ``attention``, the teacher."""

    def __init__(self, bands: int, classes: int, width: int = 64, norm: str = "batch", attention: bool = False) -> None:
        super().__init__(Encoder(bands, width, norm, attention), Decoder(classes, width, norm))
