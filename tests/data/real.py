"""Real scenes that lie beside the repository, linked where a test wants them, and the fate of every pixel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from shards.index import Index
from shards.labels import REASONS
from shards.manifest import Dataset
from shards.pack import Packed, pack
from shards.recipe import Recipe
from shards.tiles import read_tile

DATA = Path(os.environ.get("DCTC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def needs(folder: str) -> pytest.MarkDecorator:
    """Skip where the folder of real scenes is absent."""
    return pytest.mark.skipif(
        not (DATA / folder).is_dir(), reason=f"no {folder} in {DATA}; set DCTC_TEST_DATA to its parent"
    )


def link(folder: str, names: Sequence[str], root: Path) -> None:
    """Link files of a real folder below ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).symlink_to(DATA / folder / name)


def pack_one(root: Path, out: Path, **settings: Any) -> Packed:
    """Pack with tiles of 128 pixels, all of it as training data."""
    plain = {"name": "real", "tile": {"size": 128}, "splits": {"protocol": "scene", "scene": {"train": ["*"]}}}
    return pack(Recipe.model_validate(plain | settings), root, out)


def classes(*names: str) -> list[dict[str, Any]]:
    """Classes with colours that differ."""
    return [{"name": name, "color": [20 * place, 255 - 20 * place, 90]} for place, name in enumerate(names)]


def whole(dataset: Dataset, scene: str, height: int, width: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """The image [C,H,W] of a scene and its validity [H,W], put together again from tiles that do not overlap."""
    bands = len(dataset.manifest.bands)
    image = np.zeros((bands, height, width), dtype=dataset.manifest.dtype)
    valid = np.zeros((height, width), dtype=bool)
    index = Index.open(dataset)
    for row in range(len(index)):
        tile = read_tile(dataset, index, row)
        if tile.meta["scene"] != scene:
            continue
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        rows, cols = min(tile.valid.shape[0], height - top), min(tile.valid.shape[1], width - left)
        image[:, top : top + rows, left : left + cols] = tile.image[:, :rows, :cols]
        valid[top : top + rows, left : left + cols] = tile.valid[:rows, :cols]
    return image, valid


def fates(dataset: Dataset, split: str = "train") -> dict[str, int]:
    """Counts of ignored pixels by reason, without those that no pixel met; all pixels must have met some fate."""
    info = dataset.manifest.splits[split]
    assert list(info.ignored) == sorted(REASONS)
    index = Index.open(dataset)
    tiles = int((index.label_size[index.rows(split)] > 0).sum())
    assert sum(info.pixels) + sum(info.ignored.values()) == tiles * dataset.manifest.tile_size**2
    return {reason: count for reason, count in info.ignored.items() if count}
