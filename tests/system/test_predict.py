"""Whole scenes through predict_scene: the right class in the right place."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from torch import Tensor

from dctc.mapping.predict import predict_scene
from dctc.methods.turns import average_views
from tests.system.oracle import CLASSES, COLORS, HERE, UTM, Convolutions, Oracle, labels, read, write_scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

ODD_CRS = CRS.from_wkt(
    'PROJCS["Site grid of 1987",GEOGCS["local",DATUM["local datum",SPHEROID["local",6378000.123,298.123456789]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",1.23456789],PARAMETER["central_meridian",7.654321],'
    'PARAMETER["scale_factor",0.99987654321],PARAMETER["false_easting",12345.678],'
    'PARAMETER["false_northing",-98765.4321],UNIT["metre",1]]'
)
ROTATED_POLE = CRS.from_string(
    "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39.25 +lon_0=18 +ellps=WGS84 +no_defs"
)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([1, 7, 16, 32]),
    st.floats(0, 0.9),
    st.integers(1, 5),
    st.booleans(),
)
def test_an_oracle_gives_the_label_raster_exactly(
    height: int, width: int, tile: int, overlap: float, batch: int, tta: bool
) -> None:
    truth = labels(height, width)
    with tempfile.TemporaryDirectory() as folder:
        scene = write_scene(Path(folder) / "scene.tif", truth)
        outputs = predict_scene(
            Oracle(tile), scene, Path(folder) / "maps", overlap=overlap if tile > 1 else 0, batch=batch, tta=tta
        )
        np.testing.assert_array_equal(read(outputs.classes), truth)


@pytest.mark.parametrize("driver", ["GTiff", "PNG"])
@pytest.mark.parametrize("layout", [{}, {"tiled": True, "blockxsize": 128, "blockysize": 128}])
def test_a_scene_of_many_blocks_is_exact(tmp_path: Path, driver: str, layout: dict[str, Any]) -> None:
    truth = labels(700, 555)
    scene = write_scene(tmp_path / "scene", truth, driver=driver, **(layout if driver == "GTiff" else {}))
    seen: list[tuple[int, int]] = []
    outputs = predict_scene(Oracle(96), scene, tmp_path, progress=lambda *done: seen.append(done))
    np.testing.assert_array_equal(read(outputs.classes), truth)
    assert seen == sorted(seen)
    assert seen[-1] == (700 * 555, 700 * 555)
    assert outputs.pixels == 700 * 555
    assert outputs.pixels_per_s > 0


@pytest.mark.parametrize(
    "place",
    [
        pytest.param({"crs": UTM, "transform": HERE}, id="north-up"),
        pytest.param({"crs": UTM, "transform": HERE @ Affine.rotation(31.7)}, id="rotated"),
        pytest.param({"crs": UTM, "transform": Affine(0.1, 0, 5e5 + 1 / 3, 0, 0.1, 5e6 + 1 / 7)}, id="south-up"),
        pytest.param(
            {
                "crs": CRS.from_epsg(4326),
                "transform": Affine(1e-7 / 3, 0, 8.123456789012345, 0, -1e-7 / 3, 47.9876543210123),
            },
            id="degrees",
        ),
        pytest.param({"crs": ODD_CRS, "transform": HERE}, id="no-epsg"),
        pytest.param({"crs": ROTATED_POLE, "transform": HERE}, id="not-in-geotiff-keys"),
        pytest.param({"crs": None, "transform": HERE}, id="no-crs"),
        pytest.param({"crs": None, "transform": Affine.identity()}, id="nothing"),
    ],
)
def test_georeferencing_is_kept_to_the_last_bit(tmp_path: Path, place: dict[str, Any]) -> None:
    scene = write_scene(tmp_path / "scene.tif", labels(40, 50), **place)
    outputs = predict_scene(Oracle(), scene, tmp_path / "maps", probabilities=True, entropy=True)
    assert outputs.probabilities is not None
    assert outputs.entropy is not None
    for path in (outputs.classes, outputs.probabilities, outputs.entropy):
        with rasterio.open(scene) as before, rasterio.open(path) as after:
            assert after.crs == before.crs == place["crs"]
            assert (after.crs and after.crs.to_wkt()) == (before.crs and before.crs.to_wkt())
            assert tuple(after.transform) == tuple(before.transform) == tuple(place["transform"])
            assert [after.xy(*pixel) for pixel in ((0, 0), (39, 49))] == [before.xy(*p) for p in ((0, 0), (39, 49))]


def test_a_crs_that_geotiff_keys_cannot_hold_is_kept_as_text(tmp_path: Path) -> None:
    paris = CRS.from_string("+proj=longlat +pm=paris +ellps=clrk80ign")
    scene = write_scene(tmp_path / "scene.png", labels(40, 50), driver="PNG", crs=paris)
    outputs = predict_scene(Oracle(), scene, tmp_path / "maps", probabilities=True)
    assert outputs.probabilities is not None
    for path in (outputs.classes, outputs.probabilities):
        with rasterio.open(scene) as before, rasterio.open(path) as after:
            assert after.crs == before.crs == paris
            assert tuple(after.transform) == tuple(before.transform) == tuple(HERE)


def test_a_world_file_places_the_map(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", labels(40, 50), crs=None, transform=None)
    scene.with_suffix(".tfw").write_text("0.05\n0.0\n0.0\n-0.05\n366675.125\n5808000.675\n")
    outputs = predict_scene(Oracle(), scene, tmp_path / "maps")
    with rasterio.open(scene) as before, rasterio.open(outputs.classes) as after:
        assert before.transform != Affine.identity()
        assert tuple(after.transform) == tuple(before.transform)
        assert after.crs is None


def test_control_points_place_the_map(tmp_path: Path) -> None:
    points = [GroundControlPoint(row, col, 8 + col / 999, 47 - row / 999) for row, col in ((0, 0), (0, 50), (40, 0))]
    scene = write_scene(tmp_path / "scene.tif", labels(40, 50), crs=CRS.from_epsg(4326), transform=None, gcps=points)
    outputs = predict_scene(Oracle(), scene, tmp_path / "maps")
    with rasterio.open(outputs.classes) as after:
        found, crs = after.gcps
    assert crs == CRS.from_epsg(4326)
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]


def test_the_map_carries_colours_names_and_nodata(tmp_path: Path) -> None:
    outputs = predict_scene(Oracle(), write_scene(tmp_path / "a.b.tif", labels(40, 50)), tmp_path / "maps")
    assert outputs.classes == tmp_path / "maps" / "a.b_classes.tif"
    with rasterio.open(outputs.classes) as file:
        assert file.dtypes == ("uint8",)
        assert file.nodata == 255
        assert file.colorinterp == (ColorInterp.palette,)
        table = file.colormap(1)
        assert [table[code] for code in range(6)] == [(*color, 255) for color in COLORS]
        assert table[255] == (0, 0, 0, 0)
        assert [file.tags(1)[f"class_{code}"] for code in range(6)] == [info.name for info in CLASSES]
        assert file.profile["tiled"]
        assert file.profile["compress"] == "deflate"
    assert "<Category>class 5</Category>" in Path(f"{outputs.classes}.aux.xml").read_text()


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_blending_equals_one_forward_pass_over_the_whole_scene(tmp_path: Path, overlap: float) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 150, 170), np.uint8)
    model = Convolutions(64)
    outputs = predict_scene(
        model, write_scene(tmp_path / "scene.tif", values), tmp_path, overlap=overlap, entropy=True, probabilities=True
    )
    with torch.inference_mode():
        whole = model.logits(torch.from_numpy(values)[None].float())["s1"][0].softmax(0)
    assert outputs.entropy is not None
    assert outputs.probabilities is not None
    np.testing.assert_allclose(read(outputs.entropy)[0], torch.special.entr(whole).sum(0), atol=1e-4)
    np.testing.assert_allclose(read(outputs.probabilities) / 250, whole, atol=0.5 / 250 + 1e-5)
    sure = whole.topk(2, 0).values.diff(dim=0)[0].abs() > 1e-4
    np.testing.assert_array_equal(read(outputs.classes)[0][sure], whole.argmax(0)[sure])
    assert sure.float().mean() > 0.99


def test_probabilities_and_entropy_are_stored_as_documented(tmp_path: Path) -> None:
    truth = labels(40, 50)
    truth[0, :5, :7] = 200  # no class: all six equally likely
    scene = write_scene(tmp_path / "scene.tif", truth)
    outputs = predict_scene(Oracle(), scene, tmp_path, net="s2", probabilities=True, entropy=True)
    best = math.exp(8) / (math.exp(8) + 5)
    with rasterio.open(outputs.probabilities) as file:
        assert file.descriptions == tuple(info.name for info in CLASSES)
        assert file.scales == (1 / 250,) * 6
        assert file.nodata == 255
        stored = file.read()
    assert (stored[:, :5, :7] == round(250 / 6)).all()
    assert (stored.argmax(0)[5:] == 5 - truth[0, 5:]).all()
    assert (stored.max(0)[5:] == round(250 * best)).all()
    with rasterio.open(outputs.entropy) as file:
        assert np.isnan(file.nodata)
        entropy = file.read(1)
    np.testing.assert_allclose(entropy[:5, :7], np.log(6), rtol=1e-5)
    np.testing.assert_allclose(entropy[5:], -best * np.log(best) - (1 - best) * np.log((1 - best) / 5), rtol=1e-4)


def nodata_scene(path: Path, kind: str, hole: NDArray[np.bool_], values: NDArray[np.uint8]) -> Path:
    if kind == "nodata":
        values = np.where(hole, 77, values).astype(np.uint8)
        values[0, 0, 0] = 77  # in one band only: still data
        return write_scene(path, values, nodata=77)
    if kind == "alpha of 4":
        return write_scene(
            path, np.concatenate([values, np.where(hole, 0, 9).astype(np.uint8)[None]]), photometric="RGB", alpha="YES"
        )
    if kind == "alpha of 5":
        path = write_scene(path, np.concatenate([values, np.where(hole, 0, 9).astype(np.uint8)[None]]))
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [*file.colorinterp[:-1], ColorInterp.alpha]
        return path
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"):
        path = write_scene(path, values)
        with rasterio.open(path, "r+") as file:
            file.write_mask(~hole)
    return path


@pytest.mark.parametrize("kind", ["nodata", "alpha of 4", "alpha of 5", "mask"])
def test_no_data_in_is_no_data_out(tmp_path: Path, kind: str) -> None:
    bands = ("id", "b", "c", "d") if kind == "alpha of 5" else ("id", "b", "c")
    truth = np.concatenate([labels(90, 100, seed) for seed in range(len(bands))])
    hole = np.zeros((90, 100), bool)
    hole[:50, :60] = True  # whole windows of it too
    hole[80:, 95:] = True
    hole[0, 0] = False
    scene = nodata_scene(tmp_path / "scene.tif", kind, hole, truth)
    outputs = predict_scene(Oracle(32, bands), scene, tmp_path, probabilities=True, entropy=True)
    expected = np.where(hole, 255, truth[0])
    got = read(outputs.classes)[0]
    if kind == "nodata":
        got[0, 0] = expected[0, 0]  # its first band is no class
    np.testing.assert_array_equal(got, expected)
    assert outputs.probabilities is not None
    assert outputs.entropy is not None
    np.testing.assert_array_equal((read(outputs.probabilities) == 255).all(0), hole)
    np.testing.assert_array_equal(np.isnan(read(outputs.entropy)[0]), hole)


def test_missing_pixels_show_the_net_the_mean_and_not_finite_ones_are_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = labels(70, 80).astype(np.float32)
    truth[0, 20:40, 10:30] = np.nan
    truth[0, 60, 60] = np.inf
    model = Oracle(32, dtype="float32")
    model.mean = [3.0]
    shown: list[Tensor] = []
    logits = model.logits

    def listen(raw: Tensor) -> Mapping[str, Tensor]:
        shown.append(raw)
        return logits(raw)

    monkeypatch.setattr(model, "logits", listen)
    outputs = predict_scene(model, write_scene(tmp_path / "scene.tif", truth), tmp_path)
    np.testing.assert_array_equal(read(outputs.classes), np.where(np.isfinite(truth), truth, 255))
    assert all(raw.isfinite().all() for raw in shown)
    assert (shown[0][0, 0, 20:32, 10:30] == 3).all()


def test_a_scene_without_any_data_never_asks_the_net(tmp_path: Path) -> None:
    model = Oracle()
    scene = write_scene(tmp_path / "scene.tif", np.zeros((1, 70, 70), np.uint8), nodata=0)
    assert (read(predict_scene(model, scene, tmp_path).classes) == 255).all()
    assert model.calls == 0


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_value_types(tmp_path: Path, dtype: str) -> None:
    truth = labels(40, 50)
    scene = write_scene(tmp_path / "scene.tif", truth.astype(dtype))
    outputs = predict_scene(Oracle(dtype=dtype), scene, tmp_path, tta=True)
    np.testing.assert_array_equal(read(outputs.classes), truth)


def test_bands_are_found_by_name_or_number(tmp_path: Path) -> None:
    truth = np.concatenate([labels(40, 50, seed) for seed in range(4)])
    scene = write_scene(tmp_path / "scene.tif", truth)
    with rasterio.open(scene, "r+") as file:
        file.descriptions = ("Blue", "Green", "Red", "NIR")
    by_name = predict_scene(Oracle(32, ("nir", "red", "green")), scene, tmp_path / "name")
    np.testing.assert_array_equal(read(by_name.classes)[0], truth[3])
    by_number = predict_scene(Oracle(32, ("nir", "red")), scene, tmp_path / "number", bands=[2, 1])
    np.testing.assert_array_equal(read(by_number.classes)[0], truth[1])


@pytest.mark.parametrize("name", ["NIR", None])
def test_a_fourth_band_that_gdal_calls_alpha_is_a_band_of_a_model_of_four(tmp_path: Path, name: str | None) -> None:
    truth = np.concatenate([labels(40, 50, seed) for seed in range(4)])  # the fourth is often 0
    scene = write_scene(tmp_path / "scene.tif", truth)
    with rasterio.open(scene, "r+") as file:
        assert file.colorinterp[3] == ColorInterp.alpha
        file.set_band_description(4, name)
    outputs = predict_scene(Oracle(32, ("id", "green", "blue", "nir")), scene, tmp_path)
    np.testing.assert_array_equal(read(outputs.classes)[0], truth[0])


def test_a_nodata_value_that_the_file_does_not_name(tmp_path: Path) -> None:
    truth = labels(40, 50)
    outputs = predict_scene(Oracle(), write_scene(tmp_path / "scene.tif", truth), tmp_path, nodata=3)
    np.testing.assert_array_equal(read(outputs.classes), np.where(truth == 3, 255, truth))


def test_averaging_the_views_makes_any_net_turn_with_its_image() -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    images = torch.rand(2, 2, 12, 12, dtype=torch.float64)
    with torch.inference_mode():
        mean = average_views(net, images)
        assert not torch.allclose(net(images.rot90(1, (2, 3))), net(images).rot90(1, (2, 3)))
        for turns, flip in ((1, False), (2, False), (3, True), (0, True)):
            turned = images.rot90(turns, (2, 3)).flip(3) if flip else images.rot90(turns, (2, 3))
            expected = mean.rot90(turns, (2, 3)).flip(3) if flip else mean.rot90(turns, (2, 3))
            torch.testing.assert_close(average_views(net, turned), expected, atol=1e-14, rtol=0)


def test_a_turned_scene_gives_the_turned_map(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(
        0, 256, (3, 112, 112), np.uint8
    )  # windows at 0, 48: the same when turned
    model = Convolutions(64)
    entropies = []
    for name, scene in (("as-is", values), ("turned", np.rot90(values, 1, (1, 2)))):
        path = write_scene(tmp_path / f"{name}.tif", np.ascontiguousarray(scene))
        outputs = predict_scene(model, path, tmp_path, tta=True, entropy=True)
        assert outputs.entropy is not None
        entropies.append(read(outputs.entropy)[0])
    np.testing.assert_allclose(np.rot90(entropies[0]), entropies[1], atol=1e-5)
