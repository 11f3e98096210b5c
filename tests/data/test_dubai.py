from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.index import Index
from shards.pack import Packed, pack
from shards.recipe import load_recipe
from shards.tiles import read_tile
from shards.verify import verify
from tests.data.layouts import RECIPES

DATA = Path(os.environ.get("DCTC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "dubai_mbrsc"

PARTS = {1: [3, 9], 2: [1, 4, 9], 6: [5], 8: [3]}

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no Dubai scenes in {DATA}; set DCTC_TEST_DATA to their parent"),
]


@pytest.fixture(scope="module")
def dubai(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """A part of the scenes, the palette PNGs of tile 2 and the black of tile 8, part 3, among them."""
    root = tmp_path_factory.mktemp("dubai")
    for tile, parts in PARTS.items():
        for part in parts:
            for name in (f"images/image_part_{part:03d}.jpg", f"masks/image_part_{part:03d}.png"):
                link = root / f"Tile {tile}" / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(DATA / f"Tile {tile}" / name)
    return pack(load_recipe(RECIPES / "dubai.yaml"), root, tmp_path_factory.mktemp("packed") / "set")


def test_every_scene_is_where_it_belongs(dubai: Packed) -> None:
    assert len(dubai.manifest.scenes) == 7
    index = Index.open(dubai)
    for number, scene in enumerate(dubai.manifest.scenes):
        (split,) = set(index.split[index.scene == number].tolist())
        expected = 2 if scene.startswith("t8") else 1 if scene.endswith("_p009") else 0
        assert split == expected, scene
    assert dubai.report.unmatched == []
    labelled = dubai.manifest.labelled
    enough = [share for share, tiles in labelled.shares.items() if tiles >= len(dubai.manifest.classes)]
    assert {"20%", "1/4"} <= set(enough)
    assert all(labelled.missing[share] == [] for share in enough)


def test_class_pixels_are_those_of_the_masks(dubai: Packed) -> None:
    """Nothing of the test tile is lost, and palette PNGs count like the others."""
    counts = np.zeros(5, dtype=np.int64)
    ignored = 0
    for path in [DATA / f"Tile 8/masks/image_part_{part:03d}.png" for part in PARTS[8]]:
        rgb = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        found = [int((rgb == c.color).all(axis=1).sum()) for c in dubai.manifest.classes]
        counts += found
        ignored += len(rgb) - sum(found)
    info = dubai.manifest.splits["test"]
    assert info.pixels == counts.tolist()
    assert info.ignored["ignore_value"] == ignored
    assert info.ignored["unmatched"] == 0


@pytest.mark.parametrize("scene", ["t1_p003", "t2_p001", "t6_p005"])
def test_tiles_are_cut_from_the_photographs(dubai: Packed, scene: str) -> None:
    tile_number, part = scene[1:].split("_p")
    image = np.asarray(Image.open(DATA / f"Tile {tile_number}/images/image_part_{part}.jpg"))
    mask = np.asarray(Image.open(DATA / f"Tile {tile_number}/masks/image_part_{part}.png").convert("RGB"))
    index = Index.open(dubai)
    rows = np.flatnonzero(index.scene == dubai.manifest.scenes.index(scene))
    assert len(rows) >= 4
    colors = np.array([*(c.color for c in dubai.manifest.classes)], dtype=np.uint8)
    for row in rows.tolist():
        tile = read_tile(dubai, index, row)
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        part_image = np.moveaxis(image[top : top + 256, left : left + 256], -1, 0)
        height, width = part_image.shape[1:]
        # Two JPEG decoders, so not the same to the last digit.
        apart = np.abs(tile.image[:, :height, :width].astype(int) - part_image)
        assert apart.mean() < 1
        assert apart.max() < 32
        assert tile.label is not None
        known = tile.label[:height, :width] != 255
        part_mask = mask[top : top + 256, left : left + 256]
        assert np.array_equal(colors[tile.label[:height, :width][known]], part_mask[known])


def test_sound(dubai: Packed) -> None:
    assert verify(dubai.root) == []
