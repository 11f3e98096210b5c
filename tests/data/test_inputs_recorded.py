"""Every file that is read counts: a change of any is noticed, and the bytes depend on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.errors import InputError
from shards.pack import pack
from shards.recipe import Recipe
from shards.report import read_plan
from shards.verify import verify
from tests.data import layouts
from tests.data.own import generic, write_png
from tests.data.test_vectors import PLACE, UTM, box, write_features

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write_all(root: Path) -> Recipe:
    """Two stacked scenes with masks, features of both in one Shapefile, and an extra scene."""
    for scene, shift in (("x", 0), ("y", 40)):
        place = {"crs": UTM, "transform": PLACE.translation(2 * shift, 0) @ PLACE}
        for number, band in enumerate(layouts.random_image(2, 50, 40, shift)):
            layouts.write_tiff(root / f"images/{scene}_{number}.tif", band[None], **place)
        write_png(root / f"masks/{scene}.png", np.full((3, 50, 40), 255, dtype=np.uint8), "L")
    layouts.write_tiff(root / "more/z.tif", layouts.random_image(2, 40, 40, 0))
    layouts.write_tfw(root / "more/z.tfw", (1.0, 2.0))
    write_features(root / "labels/all.shp", [box(0, 0, 30, 30), box(30, 30, 30, 15)], ["a", "b"])
    return generic(
        image={"pattern": r"images/(?P<scene>\w)_(?P<band>\d)\.tif", "files": [0, 1]},
        label={"kind": "vector", "pattern": r"labels/all\.shp", "attribute": "kind"},
        mask={"pattern": r"masks/(?P<scene>\w)\.png"},
        unlabelled=[{"folder": "more", "pattern": r"(?P<scene>\w)\.tif"}],
        bands={"names": ["one", "two"]},
    )


def test_the_same_bytes_with_two_workers(tmp_path: Path) -> None:
    recipe = write_all(tmp_path / "in")
    one = pack(recipe, tmp_path / "in", tmp_path / "one")
    two = pack(recipe, tmp_path / "in", tmp_path / "two", workers=2)
    assert one.digest == two.digest
    assert verify(two.root) == []
    assert one.manifest.splits["train"].pixels == [30 * 30, 30 * 15]


def test_all_files_are_recorded(tmp_path: Path) -> None:
    plan = read_plan(pack(write_all(tmp_path / "in"), tmp_path / "in", tmp_path / "set"))
    label = [f"labels/all.{end}" for end in ("shp", "cpg", "dbf", "prj", "shx")]
    assert [[entry["path"] for entry in scene["inputs"]] for scene in plan["scenes"]] == [
        ["images/x_0.tif", "images/x_1.tif", "masks/x.png", *label],
        ["images/y_0.tif", "images/y_1.tif", "masks/y.png", *label],
        ["more/z.tif", "more/z.tfw"],
    ]


@pytest.mark.parametrize(
    "name", ["images/y_1.tif", "masks/x.png", "labels/all.shp", "labels/all.dbf", "labels/all.prj", "more/z.tfw"]
)
def test_a_change_of_any_file_is_noticed(tmp_path: Path, name: str) -> None:
    recipe = write_all(tmp_path / "in")
    pack(recipe, tmp_path / "in", tmp_path / "set")
    path = tmp_path / "in" / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match=f"holds a finished dataset and {name} is not as it was"):
        pack(recipe, tmp_path / "in", tmp_path / "set")
