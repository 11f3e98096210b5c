"""Scenes of no published layout, and datasets put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.index import Index
from shards.manifest import Dataset
from shards.pack import Packed, pack
from shards.recipe import Recipe
from shards.tiles import read_tile

GENERIC: dict[str, Any] = {
    "name": "own",
    "image": {"pattern": r"images/(?P<scene>[^/]+)\.(tif|png|jpg)"},
    "label": {"pattern": r"labels/(?P<scene>[^/]+)\.png"},
    "bands": {"names": ["red", "green", "blue"]},
    "classes": [{"name": "a", "color": [10, 20, 30]}, {"name": "b", "color": [200, 0, 90]}],
    "tile": {"size": 32},
    "splits": {"protocol": "scene", "scene": {"train": ["*"]}},
}
TWO = np.array([[10, 20, 30], [200, 0, 90]], dtype=np.uint8)


def generic(**changes: Any) -> Recipe:
    return Recipe.model_validate(GENERIC | changes)


def write_png(path: Path, colors: npt.NDArray[np.uint8], mode: str = "RGB") -> None:
    """A PNG of colours [3,H,W] as RGB, RGBA or with a colour table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.moveaxis(colors, 0, -1))
    (picture.quantize(16) if mode == "P" else picture.convert(mode)).save(path)


def packed_from(recipe: Recipe, root: Path, tmp_path: Path) -> Packed:
    return pack(recipe, root, tmp_path / "set")


def labels(dataset: Dataset, height: int, width: int) -> dict[str, npt.NDArray[np.uint8]]:
    """The label of each scene put together again; every pixel must come from exactly one tile."""
    index = Index.open(dataset)
    scenes = {name: np.full((height, width), 254, dtype=np.uint8) for name in dataset.manifest.scenes}
    for row in range(len(index)):
        tile = read_tile(dataset, index, row)
        if tile.label is None:
            continue
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        target = scenes[tile.meta["scene"]][top : top + tile.label.shape[0], left : left + tile.label.shape[1]]
        assert (target == 254).all()
        target[:] = tile.label[: target.shape[0], : target.shape[1]]
        assert (tile.label[~tile.valid] == 255).all()
    return scenes
