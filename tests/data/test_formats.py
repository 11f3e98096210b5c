from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from shards.index import Index
from shards.labels import REASONS
from shards.tiles import read_tile
from tests.data import layouts
from tests.data.own import GENERIC, TWO, generic, labels, packed_from, write_png

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_png_masks_of_every_kind(tmp_path: Path, mode: str) -> None:
    ids = layouts.random_ids(2, 32, 64, 0)
    write_png(tmp_path / "in/labels/x.png", layouts.colored(ids, TWO), mode)
    write_png(tmp_path / "in/images/x.jpg", layouts.random_image(3, 32, 64, 0))
    packed = packed_from(generic(), tmp_path / "in", tmp_path)
    assert np.array_equal(labels(packed, 32, 64)["x"], ids)


def test_transparent_mask_pixels_hold_no_label(tmp_path: Path) -> None:
    ids = layouts.random_ids(2, 32, 32, 0)
    rgba = np.concatenate([layouts.colored(ids, TWO), np.full((1, 32, 32), 255, dtype=np.uint8)])
    rgba[:, :5] = 0  # a colour that no class has
    (tmp_path / "in/labels").mkdir(parents=True)
    Image.fromarray(np.moveaxis(rgba, 0, -1)).save(tmp_path / "in/labels/x.png")
    write_png(tmp_path / "in/images/x.png", layouts.random_image(3, 32, 32, 0))
    packed = packed_from(generic(), tmp_path / "in", tmp_path)
    assert (labels(packed, 32, 32)["x"][:5] == 255).all()
    assert packed.manifest.splits["train"].ignored["label_nodata"] == 5 * 32


@pytest.mark.parametrize("rule", ["tag", "value", "alpha", "mask"])
def test_nodata_is_invalid_zeroed_and_ignored(tmp_path: Path, rule: str) -> None:
    image = layouts.random_image(3, 64, 32, 0)
    image[:, :40, :6] = 7
    image[0, 50] = 7  # one band alone is a measurement
    nodata: dict[str, Any] = {"value": {"value": 7}, "alpha": {"alpha": 4, "use_tag": False}}.get(rule, {})
    path = tmp_path / "in/images/x.tif"
    if rule == "alpha":
        alpha = np.full((1, 64, 32), 255, dtype=np.uint8)
        alpha[:, :40, :6] = 0
        layouts.write_tiff(path, np.concatenate([image, alpha]), photometric="RGB")
    else:
        layouts.write_tiff(path, image, **({"nodata": 7} if rule == "tag" else {}))
    if rule == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
            valid = np.ones((64, 32), dtype=bool)
            valid[:40, :6] = False
            target.write_mask(valid)
    ids = layouts.random_ids(2, 64, 32, 0)
    write_png(tmp_path / "in/labels/x.png", layouts.colored(ids, TWO))
    packed = packed_from(generic(nodata=nodata), tmp_path / "in", tmp_path)
    index = Index.open(packed)
    tile = read_tile(packed, index, 0)
    assert not tile.valid[:, :6].any()
    assert tile.valid[:, 6:].all()
    assert (tile.image[:, ~tile.valid] == 0).all()
    assert tile.label is not None
    assert (tile.label[:, :6] == 255).all()
    assert packed.manifest.splits["train"].ignored == dict.fromkeys(REASONS, 0) | {"image_nodata": 240}
    kept = image.reshape(3, -1)[
        :,
        np.concatenate(
            [np.pad(np.zeros((40, 6), bool), ((0, 0), (0, 26)), constant_values=True), np.ones((24, 32), bool)]
        ).ravel(),
    ]
    assert packed.manifest.bands[0].mean == pytest.approx(kept[0].astype(float).mean(), rel=1e-13)


def test_windows_without_data_and_labels_without_classes(tmp_path: Path) -> None:
    image = layouts.random_image(3, 96, 32, 0)
    image[:, :32] = 0
    layouts.write_tiff(tmp_path / "in/images/x.tif", image, nodata=0)
    colors = layouts.colored(layouts.random_ids(2, 96, 32, 0), TWO)
    colors[:, 32:64] = 0
    write_png(tmp_path / "in/labels/x.png", colors)
    label = GENERIC["label"] | {"ignore_colors": [[0, 0, 0]]}
    packed = packed_from(generic(label=label), tmp_path / "in", tmp_path)
    info = packed.manifest.splits["train"]
    assert (info.tiles, info.labelled, packed.report.empty) == (2, 1, 1)
    assert packed.manifest.labelled.total == 1


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_dtypes_bands_and_crs(tmp_path: Path, dtype: str) -> None:
    image = layouts.random_image(5, 64, 64, 0, dtype)
    if dtype == "float32":
        image[1, :3, :3] = np.nan
    local = CRS.from_proj4("+proj=tmerc +lat_0=11.5 +lon_0=7.25 +k=0.9997 +ellps=bessel +units=m")
    place = Affine(1e-7, 0, 7.2, 0, -1e-7, 11.4)
    layouts.write_tiff(
        tmp_path / "in/images/x.tif", image, crs=local, transform=place, tiled=True, blockxsize=16, blockysize=16
    )
    recipe = generic(bands={"names": ["nir", "red"], "keep": [5, 2]}, label=None, classes=[])
    packed = packed_from(recipe, tmp_path / "in", tmp_path)
    manifest = packed.manifest
    assert (manifest.dtype, [b.name for b in manifest.bands], manifest.classes) == (dtype, ["nir", "red"], [])
    index = Index.open(packed)
    for row in range(4):
        tile = read_tile(packed, index, row)
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        expected = image[[4, 1], top : top + 32, left : left + 32]
        valid = np.isfinite(expected).all(axis=0)
        assert np.array_equal(tile.valid, valid)
        assert np.array_equal(tile.image, np.where(valid, expected, 0).astype(dtype))
        assert CRS.from_wkt(tile.meta["crs"]) == local
        assert tile.meta["transform"][2] == pytest.approx(7.2 + 1e-7 * left, abs=1e-13)
        data = (packed.root / manifest.shards[0].name).read_bytes()
        start = int(index.image_offset[row])
        with MemoryFile(data[start : start + int(index.image_size[row])]) as memory, memory.open() as source:
            assert source.transform[2] == pytest.approx(tile.meta["transform"][2], abs=1e-13)


def test_several_patterns_and_odd_names(tmp_path: Path) -> None:
    for name in ("a/north east.v2.tif", "b/x.tif"):
        layouts.write_tiff(tmp_path / "in" / name, layouts.random_image(3, 32, 32, 0))
    image = {"pattern": [r"a/(?P<site>.+)\.tif", r"b/(?P<site>.+)\.tif"]}
    packed = packed_from(generic(image=image, label=None, classes=[], scene_id="s-{site}"), tmp_path / "in", tmp_path)
    assert packed.manifest.scenes == ["s-north-east-v2", "s-x"]
