"""Networks by name: one file a network, found by its module name.

A network module offers ``Encoder(bands, width, norm, attention)`` and ``Decoder(classes, width, norm)`` with the call
signatures of :mod:`dctc.networks.unet`; whoever adds a network adds such a file and nothing else. One with
``BACKBONES = True`` gets the name of a backbone as a further argument, and offers ``fit_weights`` and
``Encoder.begin_with`` as :mod:`dctc.networks.timm_unet` does.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from dctc.networks.encoder_decoder import EncoderDecoder
from dctc.networks.pretrained import UnfitWeights
from dctc.networks.timm_unet import UnavailableBackbone
from dctc.networks.unet import NORMS

__all__ = [
    "NetworkSpec",
    "UnavailableBackbone",
    "UnfitWeights",
    "UnknownNetwork",
    "begin_with",
    "build_decoder",
    "build_encoder",
    "build_network",
    "fit_weights",
    "network_names",
]


class UnknownNetwork(ValueError):
    """No module of this name holds a network; ``known`` lists those that do."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"unknown network {name!r}: choose one of {', '.join(known)}")
        self.known = known


@dataclass(frozen=True)
class NetworkSpec:
    """What is needed to build a network: enough to build it again from a model file."""

    bands: int
    classes: int
    name: str = "unet"
    width: int = 64
    norm: str = "batch"
    backbone: str = ""

    def __post_init__(self) -> None:
        if min(self.bands, self.classes, self.width) < 1:
            raise ValueError(f"bands, classes and width must be at least 1, got {self}")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: choose one of {', '.join(NORMS)}")


def network_names() -> list[str]:
    """Names of the modules of this package that offer an encoder and a decoder."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(_module(name), "Encoder") and hasattr(_module(name), "Decoder")]


def build_encoder(spec: NetworkSpec, attention: bool = False) -> nn.Module:
    """The encoder of ``spec``; raises :class:`UnknownNetwork` for a name that no module has."""
    module = _known(spec.name)
    encoder: nn.Module = module.Encoder(spec.bands, spec.width, spec.norm, attention, *_backbone(module, spec))
    return encoder


def build_decoder(spec: NetworkSpec) -> nn.Module:
    """The decoder of ``spec``; raises :class:`UnknownNetwork` for a name that no module has."""
    module = _known(spec.name)
    decoder: nn.Module = module.Decoder(spec.classes, spec.width, spec.norm, *_backbone(module, spec))
    return decoder


def build_network(spec: NetworkSpec, attention: bool = False) -> EncoderDecoder:
    """Encoder and decoder of ``spec`` as one module."""
    return EncoderDecoder(build_encoder(spec, attention), build_decoder(spec))


def fit_weights(spec: NetworkSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the whole backbone of ``spec``, which has one, as its encoders take them: for :func:`begin_with`.

    Raises:
        UnfitWeights: they are those of another network.
        UnavailableBackbone: it cannot be made.
    """
    fitted: dict[str, Tensor] = _known(spec.name).fit_weights(spec.backbone, spec.bands, weights)
    return fitted


def begin_with(spec: NetworkSpec, modules: Iterable[nn.Module], fitted: Mapping[str, Tensor]) -> None:
    """Put such weights into every encoder of ``spec`` in ``modules``; decoders stay as they are."""
    kind = _known(spec.name).Encoder
    for module in modules:
        for part in module.modules():
            if isinstance(part, kind):
                part.begin_with(fitted)


def _backbone(module: ModuleType, spec: NetworkSpec) -> list[str]:
    takes = getattr(module, "BACKBONES", False)
    if takes != bool(spec.backbone):
        problem = "needs the name of a backbone" if takes else f"takes no backbone, and {spec.backbone!r} is set"
        raise UnavailableBackbone(f"network {spec.name} {problem} (network.backbone)")
    return [spec.backbone] if takes else []


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _known(name: str) -> ModuleType:
    names = network_names()
    if name not in names:
        raise UnknownNetwork(name, names)
    return _module(name)
