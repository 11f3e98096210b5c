"""NAIP without any label, SpaceNet with building footprints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import rasterio.features

from tests.data.real import DATA, classes, fates, link, needs, pack_one, whole

NAIP, SPACENET = "naip_nd_unlabelled", "spacenet_atlanta_sample"


@needs(NAIP)
def test_imagery_without_labels(tmp_path: Path) -> None:
    names = ["m_4709963_se_14_1_20090818.tif", "m_4709963_se_14_1_20100629.tif"]
    link(NAIP, names, tmp_path / "in")
    packed = pack_one(
        tmp_path / "in",
        tmp_path / "set",
        image={"pattern": r"m_\d+_se_14_1_(?P<date>\d+)\.tif"},
        bands={"names": ["red", "green", "blue", "nir"]},
    )
    assert packed.manifest.classes == []
    assert packed.manifest.labelled.total == 0
    for name in names:
        with rasterio.open(DATA / NAIP / name) as source:
            expected = source.read()
        image, valid = whole(packed, name.split("_")[-1][:8], *expected.shape[1:])
        assert np.array_equal(valid, (expected != 0).any(axis=0))
        assert np.array_equal(image, expected)
    assert {info.labelled for info in packed.manifest.splits.values()} == {0}


@needs(SPACENET)
def test_footprints_over_a_background_class(tmp_path: Path) -> None:
    link(SPACENET, ["sample_geotiff.tif", "geotiff_labels.geojson"], tmp_path / "in")
    packed = pack_one(
        tmp_path / "in",
        tmp_path / "set",
        image={"pattern": r"(?P<scene>sample)_geotiff\.tif"},
        label={"kind": "vector", "pattern": r"geotiff_labels\.geojson", "background": "ground"},
        bands={"names": ["panchromatic"]},
        classes=classes("ground", "building"),
    )
    import pyogrio
    import shapely

    with rasterio.open(DATA / SPACENET / "sample_geotiff.tif") as source:
        expected, transform = source.read(), source.transform
    shapes = shapely.from_wkb(pyogrio.raw.read(DATA / SPACENET / "geotiff_labels.geojson")[2])
    buildings = rasterio.features.rasterize(shapes, (900, 900), transform=transform, dtype="uint8") == 1
    image, valid = whole(packed, "sample", 900, 900)
    assert np.array_equal(image, expected)
    assert np.array_equal(valid, expected[0] != 0)
    counts = [int((~buildings & valid).sum()), int((buildings & valid).sum())]
    assert packed.manifest.splits["train"].pixels == counts
    assert set(fates(packed)) <= {"image_nodata", "padding"}
