"""What predict_scene writes for others: cloud-optimised files, legends, polygons, disagreement."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import torch
from rasterio.control import GroundControlPoint
from rasterio.features import rasterize
from rasterio.transform import Affine
from rio_cogeo.cogeo import cog_validate
from torch import Tensor

from dctc.mapping.polygons import PolygonOptions
from dctc.mapping.predict import predict_scene
from shards.errors import InputError
from tests.system.oracle import CLASSES, HERE, UTM, Oracle, labels, read, write_scene

EXACT = PolygonOptions(0, 0)


def test_every_raster_is_cloud_optimised_and_classes_have_no_mixed_ids(tmp_path: Path) -> None:
    truth = np.full((1, 700, 900), 1, np.uint8)
    truth[0, :, ::3] = 5  # an average of 1 and 5 would be neither
    truth[0, :100] = 4
    scene = write_scene(tmp_path / "scene.tif", truth, nodata=4)
    maps = predict_scene(Oracle(128), scene, tmp_path / "maps", probabilities=True, entropy=True, disagreement=True)
    assert len(maps.files) == 4
    for path in maps.files:
        valid, errors, warnings = cog_validate(path, strict=True, quiet=True)
        assert valid, (path, errors, warnings)
    with rasterio.open(maps.classes) as file:
        assert file.overviews(1) == [2, 4]
    with rasterio.open(maps.classes, overview_level=0) as file:
        small = file.read(1)
    assert set(np.unique(small)) == {1, 5, 255}
    np.testing.assert_array_equal(read(maps.classes)[0], np.where(truth[0] == 4, 255, truth[0]))


def test_legends_have_each_class_with_colour_and_name(tmp_path: Path) -> None:
    maps = predict_scene(Oracle(), write_scene(tmp_path / "a.tif", labels(40, 50)), tmp_path / "maps", polygons=EXACT)
    assert maps.polygons is not None
    entries = ET.parse(maps.classes.with_suffix(".qml")).getroot().findall(".//paletteEntry")
    assert [(e.get("value"), e.get("color"), e.get("label")) for e in entries] == [
        (str(code), "#{:02x}{:02x}{:02x}".format(*info.color), info.name) for code, info in enumerate(CLASSES)
    ]
    categories = ET.parse(maps.polygons.with_suffix(".qml")).getroot().findall(".//category")
    assert [c.get("label") for c in categories] == [info.name for info in CLASSES]


class Opposed(Oracle):
    """The second student is sure of another class where the first is sure of class 0, and the same elsewhere."""

    def logits(self, raw: Tensor) -> Mapping[str, Tensor]:
        s1 = 40 * (raw[:, :1] == torch.arange(len(CLASSES))[:, None, None]).float()
        return {"s1": s1, "s2": torch.where(raw[:, :1] == 0, s1.flip(1), s1)}


def test_disagreement_is_one_where_the_students_exclude_each_other(tmp_path: Path) -> None:
    truth = labels(70, 80)
    maps = predict_scene(Opposed(), write_scene(tmp_path / "a.tif", truth), tmp_path, disagreement=True)
    assert maps.disagreement is not None
    np.testing.assert_array_equal(read(maps.disagreement), np.where(truth == 0, 250, 0))


def polygons_of(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _, _, geometry, (codes, names, pixels) = pyogrio.raw.read(path)
    assert [CLASSES[code].name for code in codes] == list(names)
    return codes, shapely.from_wkb(geometry), pixels


@pytest.mark.parametrize("place", [HERE, HERE @ Affine.rotation(31.7), Affine(0.1, 0, 5e5, 0, 0.1, 5e6)])
def test_polygons_drawn_again_are_the_map_and_strips_leave_no_seam(tmp_path: Path, place: Affine) -> None:
    coarse = labels(30, 24, 3).repeat(5, 1).repeat(7, 2)  # 150 x 168, blocks that cross the strips of 24 rows
    coarse[0, :, 50:53] = 2
    coarse[0, 60:70, 90:120] = 255
    scene = write_scene(tmp_path / "a.tif", coarse, transform=place, nodata=255)
    maps = predict_scene(Oracle(32), scene, tmp_path / "maps", polygons=EXACT)
    assert maps.polygons is not None
    codes, outlines, pixels = polygons_of(maps.polygons)
    assert pyogrio.read_info(maps.polygons)["crs"] == "EPSG:32633" == UTM.to_string()
    drawn = rasterize(zip(outlines, codes.tolist(), strict=True), (150, 168), fill=255, transform=place, dtype="uint8")
    np.testing.assert_array_equal(drawn, read(maps.classes)[0])
    whole = list(rasterio.features.shapes(read(maps.classes)[0], coarse[0] != 255, connectivity=4))
    assert len(codes) == len(whole)  # as many as of the whole map at once
    assert pixels.sum() == (coarse != 255).sum()


def test_small_polygons_are_left_out_and_outlines_have_fewer_corners(tmp_path: Path) -> None:
    truth = np.zeros((1, 90, 90), np.uint8)
    truth[0, 10:13, 10:13] = 3
    truth[0][np.hypot(*np.mgrid[-50:40, -50:40]) < 20] = 1
    scene = write_scene(tmp_path / "a.tif", truth)
    stairs = predict_scene(Oracle(), scene, tmp_path / "stairs", polygons=PolygonOptions(10, 0)).polygons
    simple = predict_scene(Oracle(), scene, tmp_path / "simple", polygons=PolygonOptions(10, 1)).polygons
    assert stairs is not None
    assert simple is not None
    codes, outlines, _ = polygons_of(stairs)
    assert sorted(codes) == [0, 1]
    _, fewer, _ = polygons_of(simple)
    assert shapely.is_valid(fewer).all()
    assert shapely.get_num_coordinates(fewer).sum() < shapely.get_num_coordinates(outlines).sum() / 2


def test_polygons_of_a_scene_on_control_points_and_odd_options_are_refused(tmp_path: Path) -> None:
    points = [GroundControlPoint(row, col, 8 + col / 999, 47 - row / 999) for row, col in ((0, 0), (0, 50), (40, 0))]
    scene = write_scene(tmp_path / "a.tif", labels(40, 50), transform=None, gcps=points)
    with pytest.raises(InputError, match=r"a\.tif: --polygons needs a scene with a transform"):
        predict_scene(Oracle(), scene, tmp_path / "maps", polygons=EXACT)
    assert not list((tmp_path / "maps").iterdir())
    with pytest.raises(InputError, match="--polygon-min-area -1"):
        PolygonOptions(minimum=-1)
