"""One net of a model as a program of its own: raw pixels in, class probabilities out, any batch, height and width."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dctc.bundle import Bundle
from shards.errors import InputError

symbolic: Any = importlib.import_module("torch.fx.experimental._config")  # its types do not tell what it has

INPUT, OUTPUT = "pixels", "probabilities"
TOLERANCE = 1e-4  # of a probability, between a written program and the eager model
TRACED = (2, 48, 80)  # batch, height, width of the example; the program is for all others as well


class Exportable(nn.Module):
    """Pixels float32 [N,bands,H,W] in source units to softmax probabilities float32 [N,classes,H,W] of one net.

    A pixel that is not finite in some band has no data: the net sees the bands' means there, as in ``dctc predict``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, bundle: Bundle, net: str) -> None:
        super().__init__()
        self._logits = bundle.method.logits
        self.parts = nn.ModuleDict(bundle.method.parts)
        self.net = net
        self.register_buffer("mean", torch.tensor(bundle.description.mean)[:, None, None])
        self.register_buffer("std", torch.tensor([s or 1.0 for s in bundle.description.std])[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        valid = torch.isfinite(pixels).all(1, keepdim=True)
        images = torch.where(valid, (pixels - self.mean) / self.std, 0.0)
        return self._logits(images)[self.net].softmax(1)


def check_net(bundle: Bundle, net: str | None) -> str:
    """The net asked for, the model's headline by default; raises :class:`InputError` for one that it has not."""
    known = list(bundle.logits(torch.zeros(1, len(bundle.bands), 16, 16)))
    if net is not None and net not in known:
        raise InputError(f"--net {net}: is not in this model; it has {', '.join(known)}")
    return net or bundle.headline


def trace(model: Exportable, bands: int) -> ExportedProgram:
    """The graph of a model for every batch, height and width from 1 on; its unused weights are left out.

    Raises:
        InputError: torch.export cannot make a graph of this network that serves all sizes.
    """
    dims = {0: Dim("batch", min=1), 2: Dim("height", min=1), 3: Dim("width", min=1)}
    example = torch.zeros(TRACED[0], bands, *TRACED[1:])
    try:
        # Sizes are never compared with 1 while tracing, and what must hold for them becomes an assertion: U2-Net's
        # pools round up, and torch cannot prove what holds for every size.
        with torch.no_grad(), symbolic.patch(backed_size_oblivious=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                model.eval(), (example,), dynamic_shapes=(dims,), prefer_deferred_runtime_asserts_over_guards=True
            )
    except Exception as error:  # torch has many for this
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"this network cannot be exported for all sizes: {reason[:300]}") from error
    return program


def metadata(bundle: Bundle, net: str) -> dict[str, str]:
    """What an exported file says of itself: texts, or JSON where a value is a list or a number."""
    about = bundle.description
    values: dict[str, Any] = {
        "producer": "dctc",
        "net": net,
        "input": f"{INPUT}: float32 [batch, band, height, width], pixels in source units; not finite = no data",
        "output": f"{OUTPUT}: float32 [batch, class, height, width], softmax",
        "bands": list(about.bands),
        "pixel_type": about.dtype,
        "class_names": [info.name for info in about.classes],
        "class_colors": [list(info.color) for info in about.classes],
        "tile_size": about.tile_size,
        "method": about.method,
        "network": about.network.name,
        "dataset": about.dataset,
        "run_id": about.run_id or "",
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def samples(bundle: Bundle) -> list[Tensor]:
    """Pixels to compare programs on: the tile, one pixel, odd sizes, small and larger than the tile, some no data."""
    tile = bundle.tile_size
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (bundle.description.mean, bundle.description.std))
    shapes = [(1, tile, tile), (1, 1, 1), (3, 33, 50), (2, 17, tile + 5)]
    made = []
    for batch, height, width in shapes:
        pixels = mean + 2 * std * torch.randn(batch, len(bundle.bands), height, width, generator=generator)
        pixels[:, :, : height // 4, : width // 3] = torch.nan
        made.append(pixels)
    return made


def largest_difference(
    model: Exportable, program: Callable[[Tensor], Tensor], pixels: Sequence[Tensor]
) -> tuple[float, str]:
    """Of the probabilities, and the shape at which it is; infinite where a shape or a value does not fit at all."""
    worst = (0.0, "")
    for sample in pixels:
        with torch.no_grad():
            expected, found = model(sample), program(sample)
        fits = expected.shape == found.shape and bool(torch.isfinite(found).all())
        difference = float((expected - found).abs().max()) if fits else float("inf")
        worst = max(worst, (difference, "x".join(map(str, sample.shape))))
    return worst
