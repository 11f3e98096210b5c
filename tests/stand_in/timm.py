"""A stand-in for the library timm, which the tests do not install: what dctc asks of it, with small networks.

``small``; ``normless``, without batch norms; ``deep``, which goes on where ``small`` ends; ``wide``, of more channels;
``fixed``, for images of 24 px alone, as many transformers are; ``last``, with the channels last, as Swin's are.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor, nn

_WIDTHS = {"small": (6, 10, 14), "deep": (6, 10, 14, 18), "wide": (8, 10, 14)}
_KINDS = ("small", "normless", "deep", "wide", "fixed", "last")
CLASSES = 9


def create_model(name: str, *, pretrained: bool, features_only: bool = False, in_chans: int = 3) -> nn.Module:
    """A network with its classifier, or what makes its feature maps; never pre-trained."""
    assert not pretrained
    if name not in _KINDS:
        raise RuntimeError(f"Unknown model ({name})")
    return Trunk(in_chans, name) if features_only else Whole(in_chans, name)


def _stages(bands: int, kind: str) -> list[nn.Module]:
    return [
        nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.Identity() if kind == "normless" else nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        for inputs, outputs in pairwise((bands, *_WIDTHS.get(kind, _WIDTHS["small"])))
    ]


class Whole(nn.Module):
    """Images to scores of classes; its stages are a sequence, ``stages.0`` and so on."""

    def __init__(self, bands: int, kind: str) -> None:
        super().__init__()
        stages = _stages(bands, kind)
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(_WIDTHS.get(kind, _WIDTHS["small"])[-1])
        self.head = nn.Linear(self.norm.normalized_shape[0], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B,classes]."""
        scores: Tensor = self.head(self.norm(self.stages(images).mean(dim=(2, 3))))
        return scores


class Trunk(nn.Module):
    """Maps at strides 2, 4, 8 (16): the stages have names of their own, ``stages_0`` and so on."""

    def __init__(self, bands: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rates = torch.linspace(0, 0.1, 3).tolist()  # ConvNeXt's maker reads values back from a tensor
        stages = _stages(bands, kind)
        self.names = [f"stages_{number}" for number in range(len(stages))]
        for name, stage in zip(self.names, stages, strict=True):
            self.add_module(name, stage)
        channels = list(_WIDTHS.get(kind, _WIDTHS["small"]))
        strides = [2 ** (number + 1) for number in range(len(stages))]
        self.feature_info = SimpleNamespace(channels=lambda: channels, reduction=lambda: strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps, finest first."""
        if self.kind == "fixed" and images.shape[-2:] != (24, 24):
            raise AssertionError(f"Input height ({images.shape[-2]}) doesn't match model (24).")
        maps: list[Tensor] = []
        for name in self.names:
            maps.append(getattr(self, name)(maps[-1] if maps else images))
        return [m.movedim(1, -1) for m in maps] if self.kind == "last" else maps
