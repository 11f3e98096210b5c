"""Images whose bands lie in files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject

from shards.errors import InputError
from shards.headers import common_dtype
from shards.pack import Packed
from tests.data import layouts
from tests.data.own import generic, packed_from, write_png
from tests.data.real import whole

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

PLACE = Affine(10.0, 0, 300000.0, 0, -10.0, 5000000.0)
STACK = {"pattern": r"(?P<scene>\w+)_B(?P<band>\w+)\.tif", "files": ["4", "3", "8A"]}
NAMES = {"names": ["red", "green", "nir"]}


def write_band(root: Path, scene: str, band: str, array: Any, **options: Any) -> None:
    place = {"crs": "EPSG:32633", "transform": PLACE}
    layouts.write_tiff(root / f"{scene}_B{band}.tif", array[None], **(place | options))


def packed(root: Path, out: Path, image: dict[str, Any] | None = None, **changes: Any) -> Packed:
    settings = {"image": STACK | (image or {}), "bands": NAMES, "label": None, "classes": []} | changes
    return packed_from(generic(**settings), root, out)


@pytest.mark.parametrize(
    ("dtypes", "together"),
    [
        (["uint8"], "uint8"),
        (["uint8", "uint16"], "uint16"),
        (["uint8", "int16"], "int16"),
        (["int16", "uint16"], "float32"),
        (["uint8", "float32"], "float32"),
        (["uint8", "uint32"], "uint32"),  # none of ours: the caller refuses it
    ],
)
def test_the_smallest_dtype_that_holds_all_values(dtypes: list[str], together: str) -> None:
    assert common_dtype(dtypes) == together
    for dtype in dtypes if together != "uint32" else ():
        if dtype != "float32":
            ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype=dtype)
            assert ends.astype(together).tolist() == ends.tolist()


def test_files_are_stacked_in_the_order_of_the_recipe_each_with_its_nodata(tmp_path: Path) -> None:
    red = layouts.random_image(1, 70, 50, 0, "uint16")[0]
    green = layouts.random_image(1, 70, 50, 1, "int16")[0]
    nir = layouts.random_image(1, 70, 50, 2, "uint8")[0]
    red[0, :9], green[0, 4:20], nir[0, 6:8] = 65535, -7, 200
    write_band(tmp_path / "in", "x", "4", red, nodata=65535, tiled=True, blockxsize=16, blockysize=16)
    write_band(tmp_path / "in", "x", "3", green, nodata=-7)
    write_band(tmp_path / "in", "x", "8A", nir)  # 200 is a measurement here
    write_band(tmp_path / "in", "x", "11", nir[:8, :8])  # not asked for
    missing = np.stack([red == 65535, green == -7, np.zeros_like(red, dtype=bool)])
    expected = np.where(missing, 0, np.stack([red.astype(np.float32), green, nir])).astype(np.float32)
    got = packed(tmp_path / "in", tmp_path)
    image, valid = whole(got, "x", 70, 50)
    assert got.manifest.dtype == "float32"
    assert valid.all()  # one band has data everywhere, and the rule is "all"
    assert np.array_equal(image, expected)
    image, valid = whole(packed(tmp_path / "in", tmp_path / "any", nodata={"match": "any"}), "x", 70, 50)
    assert np.array_equal(valid, ~missing.any(axis=0))
    assert np.array_equal(image, np.where(valid, expected, 0))
    bands = {"names": ["nir", "green"], "keep": [3, 2]}
    image, _ = whole(packed(tmp_path / "in", tmp_path / "kept", bands=bands), "x", 70, 50)
    assert np.array_equal(image, expected[[2, 1]])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    band = layouts.random_image(1, 32, 32, 0)[0]
    for scene, numbers in (("x", ["4", "3", "8A"]), ("y", ["4", "8A"])):
        for number in numbers:
            write_band(tmp_path / "in", scene, number, band)
    with pytest.raises(
        InputError, match=r"scene 'y' lacks the file of '3', which image\.files names, beside y_B4\.tif"
    ):
        packed(tmp_path / "in", tmp_path)
    write_band(tmp_path / "in/copy", "y", "4", band)
    with pytest.raises(InputError, match=r"scene 'y' has two images of '4'"):
        packed(tmp_path / "in", tmp_path, {"pattern": r"(?:copy/)?(?P<scene>\w+)_B(?P<band>\w+)\.tif"})


def test_files_of_other_kinds_and_grids(tmp_path: Path) -> None:
    band = layouts.random_image(1, 32, 32, 0)[0]
    write_band(tmp_path / "in", "x", "4", band)
    write_band(tmp_path / "in", "x", "3", band)
    write_band(tmp_path / "in", "x", "8A", band[:16, :16], transform=PLACE @ Affine.scale(2))
    with pytest.raises(InputError, match=r"x_B8A\.tif: 16 x 16 pixels that do not lie on the grid of x_B4\.tif"):
        packed(tmp_path / "in", tmp_path)
    write_band(tmp_path / "in", "x", "8A", band, transform=PLACE @ Affine.translation(1, 0))
    with pytest.raises(InputError, match=r"x_B8A\.tif: 32 x 32 pixels that do not lie on the grid"):
        packed(tmp_path / "in", tmp_path)
    write_band(tmp_path / "in", "x", "8A", band[:16, :16], transform=Affine.identity(), crs=None)
    with pytest.raises(InputError, match=r"x_B8A\.tif: cannot be resampled onto its image's grid"):
        packed(tmp_path / "in", tmp_path, {"resampling": "nearest"})
    layouts.write_tiff(tmp_path / "in/x_B8A.tif", layouts.random_image(3, 32, 32, 0))
    with pytest.raises(InputError, match=r"x_B8A\.tif: has 3 bands, but image\.files stacks files of one band each"):
        packed(tmp_path / "in", tmp_path)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "cubic", "average"])
def test_resampled_files_are_those_of_a_plain_warp(tmp_path: Path, method: str) -> None:
    """Coarser, moved and with holes: what is warped equals GDAL's warp of the whole file at once."""
    sharp = layouts.random_image(1, 90, 75, 0, "uint16")[0]
    coarse = layouts.random_image(1, 40, 40, 1, "uint16")[0]
    coarse[10:14, 5:9] = 7
    moved = PLACE @ Affine.translation(5, 3) @ Affine.scale(2)
    for number in ("4", "3"):
        write_band(tmp_path / "in", "x", number, sharp)
    write_band(tmp_path / "in", "x", "8A", coarse, transform=moved, nodata=7)
    got = packed(tmp_path / "in", tmp_path, {"resampling": method}, nodata={"match": "any"})
    target = np.zeros((90, 75), dtype=np.uint16)
    reproject(
        coarse,
        target,
        src_transform=moved,
        src_crs="EPSG:32633",
        dst_transform=PLACE,
        dst_crs="EPSG:32633",
        src_nodata=7,
        dst_nodata=7,
        resampling=Resampling[method],
        tolerance=1e-9,
    )
    image, valid = whole(got, "x", 90, 75)
    assert not valid[0].any()
    assert 0.6 < valid.mean() < 0.95
    assert np.array_equal(valid, target != 7)
    assert np.array_equal(image[2], np.where(valid, target, 0))
    assert np.array_equal(image[0], np.where(valid, sharp, 0))


def test_stacks_with_labels_and_without_crs(tmp_path: Path) -> None:
    band = layouts.random_image(1, 40, 40, 0)[0]
    for number in ("4", "3", "8A"):
        layouts.write_tiff(tmp_path / f"in/x_B{number}.tif", band[None])
    colors = layouts.colored(np.zeros((40, 40), dtype=np.uint8), np.array([[10, 20, 30]], dtype=np.uint8))
    write_png(tmp_path / "in/x_labels.png", colors)
    label = {"pattern": r"(?P<scene>\w+)_labels\.png"}
    got = packed_from(generic(image=STACK, bands=NAMES, label=label), tmp_path / "in", tmp_path)
    assert got.manifest.splits["train"].pixels == [1600, 0]


def test_a_stack_cut_short_in_its_middle(tmp_path: Path) -> None:
    for number in ("4", "3", "8A"):
        write_band(tmp_path / "in", "x", number, layouts.random_image(1, 300, 300, 0)[0])
    path = tmp_path / "in/x_B3.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"x_B3\.tif: cannot be read, is it damaged or cut short"):
        packed(tmp_path / "in", tmp_path)


def test_mask_files_of_single_bands(tmp_path: Path) -> None:
    band = layouts.random_image(1, 32, 32, 0)[0]
    for number in ("4", "3", "8A"):
        write_band(tmp_path / "in", "x", number, band)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "in/x_B3.tif", "r+") as target:
        inside = np.ones((32, 32), dtype=bool)
        inside[:5] = False
        target.write_mask(inside)
    image, valid = whole(packed(tmp_path / "in", tmp_path), "x", 32, 32)
    assert valid.all()
    assert (image[1, :5] == 0).all()
    assert np.array_equal(image[0], band)
    _, valid = whole(packed(tmp_path / "in", tmp_path / "any", nodata={"match": "any"}), "x", 32, 32)
    assert np.array_equal(valid, inside)
