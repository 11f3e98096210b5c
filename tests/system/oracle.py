"""Small models whose right map is known, and scenes for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import Affine
from torch import Tensor

from shards.manifest import ClassInfo

COLORS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
CLASSES = [ClassInfo(name=f"class {code}", color=color) for code, color in enumerate(COLORS)]
HERE = Affine(0.05, 0, 366_675.1, 0, -0.05, 5_808_000.7)
UTM = CRS.from_epsg(32633)


class Oracle:
    """Reads the class off the first band, so the only right map is that band itself."""

    def __init__(self, tile_size: int = 32, bands: Sequence[str] = ("id",), dtype: str = "uint8") -> None:
        self.bands = list(bands)
        self.dtype = dtype
        self.mean = [0.0] * len(bands)
        self.classes = CLASSES
        self.tile_size = tile_size
        self.headline = "s1"
        self.calls = 0
        self.at: dict[int, Callable[[], None]] = {}  # number of the call -> what goes wrong in it

    def logits(self, raw: Tensor) -> Mapping[str, Tensor]:
        self.calls += 1
        self.at.get(self.calls, lambda: None)()
        assert raw.shape[1:] == (len(self.bands), self.tile_size, self.tile_size)
        hit = raw[:, :1] == torch.arange(len(CLASSES), device=raw.device)[:, None, None]
        return {"s1": 8 * hit.float(), "s2": 8 * hit.flip(1).float()}


class Convolutions(Oracle):
    """Three 3x3 convolutions with random weights: a pixel sees three pixels in each direction."""

    def __init__(self, tile_size: int) -> None:
        super().__init__(tile_size, ("red", "green", "blue"))
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, len(CLASSES), 3, padding=1),
        )

    def logits(self, raw: Tensor) -> Mapping[str, Tensor]:
        return {"s1": 5 * self.net(raw / 64 - 2)}


def write_scene(path: Path, values: NDArray[Any], **profile: Any) -> Path:
    profile = {"driver": "GTiff", "crs": UTM, "transform": HERE, **profile}
    count, height, width = values.shape
    with rasterio.open(path, "w", count=count, height=height, width=width, dtype=values.dtype, **profile) as file:
        file.write(values)
    return path


def labels(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, len(CLASSES), (1, height, width), np.uint8)


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as file:
        values: NDArray[Any] = file.read()
    return values
