"""A U-Net whose encoder is a network of the library timm, by the name in ``network.backbone``: resnet34, convnext_tiny.

timm is an optional extra, and needs torchvision. The trunk keeps the norms that it comes with (``norm: sync`` turns its
batch norms into synchronised ones; ``norm: group`` is refused where it has any); ``width`` is the decoder's. Weights
are random; those of a file can take their place afterwards (:func:`fit_weights`, :meth:`Encoder.begin_with`).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dctc.networks.block import Block
from dctc.networks.channel_attention import ChannelAttention
from dctc.networks.pretrained import RGB, fit
from dctc.networks.unet import double_convolution, pad_to_stride

BACKBONES = True  # this network is not whole without one


class UnavailableBackbone(ValueError):
    """timm cannot be imported, has no such network, or its network does not serve here."""


def make_trunk(backbone: str, bands: int) -> nn.Module:
    """The feature maps of a timm network; raises :class:`UnavailableBackbone`."""
    timm = _library()
    try:
        trunk: nn.Module = timm.create_model(backbone, pretrained=False, features_only=True, in_chans=bands)
    except Exception as error:  # its own, a KeyError or a RuntimeError, as the name goes
        raise UnavailableBackbone(f"backbone {backbone!r}: timm cannot make feature maps of it ({error})") from error
    return trunk


def _library() -> Any:
    try:
        return importlib.import_module("timm")
    except Exception as error:  # without torchvision it fails in ways of its own
        raise UnavailableBackbone(
            f"network timm_unet needs timm and torchvision ({error}): pip install -c constraints.txt -e '.[timm]', "
            "with the torchvision that was built for your torch"
        ) from error


def fit_weights(backbone: str, bands: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a whole timm network as a trunk of it for ``bands`` takes them: its state dict.

    Both are made to know their names and shapes, and let go. Nothing is drawn from the global generator, so that what
    stays random is what it is without a file.

    Raises:
        UnavailableBackbone: as :func:`make_trunk`.
        dctc.networks.pretrained.UnfitWeights: they are those of another network.
    """
    with torch.random.fork_rng(devices=[]):
        trunk = make_trunk(backbone, bands).state_dict()
        whole = _library().create_model(backbone, pretrained=False, in_chans=RGB).state_dict()
    return fit(trunk, whole, weights, backbone)


def shape_of(trunk: nn.Module) -> tuple[list[int], list[int]]:
    """Channels and strides of the feature maps, finest first."""
    info: Any = trunk.feature_info
    return list(info.channels()), list(info.reduction())


def check_trunk(trunk: nn.Module, backbone: str, bands: int) -> None:
    """Refuse what is not a pyramid of maps [B,C,H,W] for images of any size; raises :class:`UnavailableBackbone`.

    Many transformers are made for one size, and some put the channels last. A pass over a small image tells: not
    a square one, as those sizes are.
    """
    channels, strides = shape_of(trunk)
    height, breadth = 2 * strides[-1], 3 * strides[-1]
    expected = [(1, c, height // s, breadth // s) for c, s in zip(channels, strides, strict=True)]
    advice = "take another one, such as resnet34 or convnext_tiny"
    try:
        with torch.no_grad():
            found = [tuple(m.shape) for m in trunk.eval()(torch.zeros(1, bands, height, breadth))]
    except Exception as error:  # each network has its own
        raise UnavailableBackbone(
            f"backbone {backbone!r} does not take images of any size ({error}): {advice}"
        ) from error
    if found != expected:
        raise UnavailableBackbone(
            f"backbone {backbone!r} makes maps of the shapes {found} where {expected} are needed: {advice}"
        )
    trunk.train()


class Encoder(nn.Module):
    """The trunk, recomputed and sharded as one block; with ``attention`` channel attention on each feature map."""

    def __init__(
        self, bands: int, width: int, norm: str = "batch", attention: bool = False, backbone: str = ""
    ) -> None:
        super().__init__()
        trunk = make_trunk(backbone, bands)
        check_trunk(trunk, backbone, bands)
        channels, strides = shape_of(trunk)
        if norm == "group" and any(isinstance(module, _BatchNorm) for module in trunk.modules()):
            raise UnavailableBackbone(
                f"backbone {backbone!r} has batch norms, which network.norm=group does not replace: take batch or sync"
            )
        if norm == "sync":
            trunk = nn.SyncBatchNorm.convert_sync_batchnorm(trunk)  # type: ignore[no-untyped-call]  # torch has no types
        self.trunk = Block(trunk)
        self.stride = strides[-1]
        self.attention = nn.ModuleList(ChannelAttention(c) if attention else nn.Identity() for c in channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B,bands,H,W], their last row and column repeated up to a multiple of the stride, to feature maps,
        finest first."""
        maps = self.trunk(pad_to_stride(images, self.stride))
        return [attention(m) for attention, m in zip(self.attention, maps, strict=True)]

    def begin_with(self, fitted: Mapping[str, Tensor]) -> None:
        """Put the weights of :func:`fit_weights` into the trunk; channel attention stays as it is."""
        self.trunk[0].load_state_dict(fitted)


class Decoder(nn.Module):
    """Nearest-neighbour sampling up, skip concatenation, two convolutions at each scale; logits at the finest map's
    scale, bilinear to the image's."""

    def __init__(self, classes: int, width: int, norm: str = "batch", backbone: str = "") -> None:
        super().__init__()
        channels, strides = shape_of(make_trunk(backbone, 3))  # made for its shape, and let go
        self.stride = strides[0]
        widths = [channels[-1], *(width * 2**scale for scale in reversed(range(len(channels) - 1)))]
        self.blocks = nn.ModuleList(
            double_convolution(below + skip, outputs, norm)
            for (below, outputs), skip in zip(itertools.pairwise(widths), reversed(channels[:-1]), strict=True)
        )
        self.head = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Feature maps of :class:`Encoder` to logits [B,classes,H,W], ``size`` = (H, W) of the image."""
        current = features[-1]
        for block, skip in zip(self.blocks, reversed(features[:-1]), strict=True):
            current = block(torch.cat([F.interpolate(current, size=skip.shape[-2:]), skip], dim=1))
        logits: Tensor = F.interpolate(self.head(current), scale_factor=self.stride, mode="bilinear")
        return logits[..., : size[0], : size[1]]
