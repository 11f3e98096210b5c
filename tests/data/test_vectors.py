from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio.features
import rasterio.warp
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine

from shards.errors import InputError
from shards.grids import Grid
from shards.inputs import Vector
from shards.labels import UNLABELLED
from shards.rows import Rows
from shards.sections import ClassColor
from shards.vectors import VectorLabel
from tests.data import layouts
from tests.data.own import generic, labels, packed_from
from tests.data.real import fates

UTM = "EPSG:32632"
PLACE = Affine(2.0, 0, 500000.0, 0, -2.0, 5300000.0)
VECTOR: dict[str, Any] = {"kind": "vector", "pattern": r"labels/all\.(gpkg|shp|geojson)", "attribute": "kind"}


def box(col: float, row: float, width: float, height: float) -> shapely.Polygon:
    """A rectangle of pixels of PLACE, in its coordinates."""
    return shapely.box(500000 + 2 * col, 5300000 - 2 * (row + height), 500000 + 2 * (col + width), 5300000 - 2 * row)


def write_features(
    path: Path,
    shapes: Sequence[Any],
    values: Sequence[Any],
    crs: str | None = UTM,
    layer: str | None = None,
    append: bool = False,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyogrio.raw.write(
        path,
        geometry=shapely.to_wkb(np.array(shapes, dtype=object)),
        field_data=[np.array(values, dtype=object if isinstance(values[0], str | None) else None)],
        fields=["kind"],
        geometry_type="Unknown" if path.suffix != ".shp" else "Polygon",
        crs=crs,
        layer=layer,
        append=append,
    )
    return path


def write_image(path: Path, height: int = 64, width: int = 64, **options: Any) -> None:
    layouts.write_tiff(path, layouts.random_image(3, height, width, 0), **({"crs": UTM, "transform": PLACE} | options))


@pytest.mark.parametrize("end", ["gpkg", "shp", "geojson"])
def test_later_features_win_and_the_rest_is_unlabelled(tmp_path: Path, end: str) -> None:
    write_image(tmp_path / "in/images/x.tif")
    shapes = [box(0, 0, 40, 40), box(20, 20, 40, 40), box(5, 5, 10, 10), box(30, 30, 5, 5)]
    crs = UTM
    if end == "geojson":  # always in degrees
        crs = "EPSG:4326"
        lon, lat = zip(*(rasterio.warp.transform(UTM, crs, *s.exterior.xy) for s in shapes), strict=True)
        shapes = [shapely.Polygon(zip(xs, ys, strict=True)) for xs, ys in zip(lon, lat, strict=True)]
    write_features(tmp_path / f"in/labels/all.{end}", shapes, ["A", "B", "skip", "A"], crs=crs)
    label = VECTOR | {"map": {"A": "a", "B": "b", "skip": "ignore"}}
    packed = packed_from(generic(label=label), tmp_path / "in", tmp_path)
    truth = np.full((64, 64), 255, dtype=np.uint8)
    truth[:40, :40] = 0
    truth[20:60, 20:60] = 1
    truth[5:15, 5:15] = 255
    truth[30:35, 30:35] = 0
    assert np.array_equal(labels(packed, 64, 64)["x"], truth)
    assert fates(packed) == {"ignore_value": 100, "unlabelled": 64 * 64 - 40 * 40 - 40 * 40 + 20 * 20}


def test_a_spatial_index_does_not_change_the_order(tmp_path: Path) -> None:
    """A GeoPackage answers a search by place in the order of its index; the order of the file must win."""
    write_image(tmp_path / "in/images/x.tif")
    generator = np.random.default_rng(0)
    corners = generator.integers(-20, 60, (600, 2))
    shapes = [box(int(col), int(row), 12, 12) for col, row in corners]
    kinds = generator.choice(["a", "b"], 600)
    write_features(tmp_path / "in/labels/all.gpkg", shapes, kinds.tolist())
    packed = packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    truth = np.full((64, 64), 255, dtype=np.uint8)
    for (col, row), kind in zip(corners.tolist(), kinds.tolist(), strict=True):
        truth[max(0, row) : max(0, row + 12), max(0, col) : max(0, col + 12)] = "ab".index(kind)
    assert np.array_equal(labels(packed, 64, 64)["x"], truth)


def test_one_file_of_many_scenes_leaves_untouched_ones_unlabelled(tmp_path: Path) -> None:
    write_image(tmp_path / "in/images/x.tif")
    write_image(tmp_path / "in/images/y.tif", transform=PLACE @ Affine.translation(1000, 0))
    write_image(tmp_path / "in/images/z.tif", crs="EPSG:25833", transform=Affine(2, 0, 51000, 0, -2, 5330000))
    write_features(tmp_path / "in/labels/all.gpkg", [box(0, 0, 10, 10), box(2000, 0, 9, 9)], ["a", "b"])
    packed = packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    assert packed.report.unlabelled_scenes == 2
    assert packed.manifest.splits["train"].pixels == [100, 0]
    assert fates(packed) == {"unlabelled": 64 * 64 - 100}
    behind = VECTOR | {"background": "b"}
    packed = packed_from(generic(label=behind), tmp_path / "in", tmp_path / "b")
    assert packed.report.unlabelled_scenes == 0
    assert packed.manifest.splits["train"].pixels == [100, 3 * 64 * 64 - 100]
    assert fates(packed) == {}


def test_a_file_for_each_scene_layers_and_numbers(tmp_path: Path) -> None:
    write_image(tmp_path / "in/images/x.tif")
    write_image(tmp_path / "in/images/y.tif")
    path = write_features(tmp_path / "in/labels/x.gpkg", [box(0, 0, 8, 8)], [1], layer="old")
    write_features(path, [box(0, 0, 4, 8), box(4, 0, 1, 8)], [1, 2], layer="new", append=True)
    label = {"kind": "vector", "pattern": r"labels/(?P<scene>.+)\.gpkg", "attribute": "kind", "map": {1: "a", 2: "b"}}
    with pytest.raises(InputError, match=r"x\.gpkg: has the layers old, new: name one as label\.layer"):
        packed_from(generic(label=label), tmp_path / "in", tmp_path)
    with pytest.raises(InputError, match=r"x\.gpkg: has no layer 'newer'; it has old, new"):
        packed_from(generic(label=label | {"layer": "newer"}), tmp_path / "in", tmp_path)
    packed = packed_from(generic(label=label | {"layer": "new"}), tmp_path / "in", tmp_path / "b")
    assert packed.manifest.splits["train"].pixels == [32, 8]
    assert packed.report.unlabelled_scenes == 1


def test_unknown_values_become_ignore_and_too_many_stop(tmp_path: Path) -> None:
    write_image(tmp_path / "in/images/x.tif")
    shapes = [box(col, 0, 1, 64) for col in range(40)]
    write_features(tmp_path / "in/labels/all.gpkg", shapes, ["a"] * 37 + ["moor", "moor", None])
    with pytest.raises(InputError) as caught:
        packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    for part in ("all.gpkg: 7.50% of the features", "moor (2 features); null (1 features)", "label.map", "scene x"):
        assert part in str(caught.value)
    packed = packed_from(generic(label=VECTOR | {"max_unmatched_share": 0.1}), tmp_path / "in", tmp_path / "b")
    assert fates(packed) == {"unmatched": 3 * 64, "unlabelled": 24 * 64}
    (scene,) = packed.report.unmatched
    assert (scene.counted, scene.count, scene.values) == ("features", 3, [("moor", 2), ("null", 1)])


def test_files_that_lack_something(tmp_path: Path) -> None:
    write_image(tmp_path / "in/images/x.tif")
    path = write_features(tmp_path / "in/labels/all.gpkg", [box(0, 0, 9, 9)], ["a"])
    with pytest.raises(InputError, match=r"all\.gpkg: layer 'all' has no attribute 'class'; it has kind"):
        packed_from(generic(label=VECTOR | {"attribute": "class"}), tmp_path / "in", tmp_path)
    write_features(tmp_path / "in/labels/all.shp", [box(0, 0, 9, 9)], ["a"])
    with pytest.raises(InputError, match=r"all\.gpkg and labels/all\.shp both match .* one file for all scenes"):
        packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    for file in tmp_path.glob("in/labels/all.*"):
        file.unlink()
    with pytest.raises(InputError, match="no file matches the label pattern"):
        packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    path.write_bytes(b"SQLite format 3\0 and nothing more")
    with pytest.raises(InputError, match=r"all\.gpkg: cannot be read as a vector file"):
        packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)


@pytest.mark.parametrize("end", ["gpkg", "geojson", "shp"])
def test_files_cut_short(tmp_path: Path, end: str) -> None:
    write_image(tmp_path / "in/images/x.tif")
    shapes = [box(k % 50, k // 50, 1, 1) for k in range(2000)]
    path = write_features(tmp_path / f"in/labels/all.{end}", shapes, ["a"] * 2000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"all\.{end}: cannot be read as a vector file"):
        packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    assert not (tmp_path / "set/manifest.json").exists()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_a_crs_that_only_one_side_has(tmp_path: Path) -> None:
    write_image(tmp_path / "in/images/x.tif")
    write_features(tmp_path / "in/labels/all.shp", [box(0, 0, 9, 9)], ["a"], crs=None)
    with pytest.raises(InputError, match=r"labels/all\.shp: has no CRS, but images/x\.tif has one"):
        packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    write_image(tmp_path / "in/images/x.tif", crs=None)
    packed = packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path)
    assert packed.manifest.splits["train"].pixels == [81, 0]
    write_features(tmp_path / "in/labels/all.shp", [box(0, 0, 9, 9)], ["a"])
    with pytest.raises(InputError, match=r"images/x\.tif: has no CRS, but .*all\.shp has one"):
        packed_from(generic(label=VECTOR), tmp_path / "in", tmp_path / "b")


def test_without_the_extra_the_error_names_it(tmp_path: Path) -> None:
    write_image(tmp_path / "in/images/x.tif")
    write_features(tmp_path / "in/labels/all.gpkg", [box(0, 0, 9, 9)], ["a"])
    program = (
        "import sys; sys.modules['pyogrio'] = None\n"
        "from pathlib import Path\n"
        "from shards.headers import check_scenes\n"
        "from shards.scenes import find_scenes\n"
        "from tests.data.own import generic\n"
        f"recipe, root = generic(label={VECTOR!r}), Path({str(tmp_path / 'in')!r})\n"
        "check_scenes(recipe, root, find_scenes(recipe, root))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (
        "needs the extra vector, which is not installed (pyogrio is missing): pip install dctc[vector]" in done.stderr
    )


CLASSES = [ClassColor(name=name, color=(k, 0, 0)) for k, name in enumerate("abc")]
Place = tuple[float, float]


def rings(cols: st.SearchStrategy[float], rows: st.SearchStrategy[float]) -> st.SearchStrategy[list[Place]]:
    return st.lists(st.tuples(cols, rows), min_size=3, max_size=8, unique=True)


def odd(offset: int) -> st.SearchStrategy[float]:
    return st.integers(-30_000, 130_000).map(lambda n: n / 1024 + offset / 2**20)


# Hardly an edge runs through the corner of a pixel, where rounding decides which pixels are touched.
crooked = rings(odd(301), odd(747))
halves = st.integers(-60, 260).map(lambda n: n / 2)  # vertices on the borders and in the centres of pixels
straight = rings(halves, halves)


@settings(max_examples=60, deadline=None)
@given(
    drawing=st.tuples(st.just(False), st.lists(st.tuples(straight, st.sampled_from("abc")), min_size=1, max_size=4))
    | st.tuples(st.booleans(), st.lists(st.tuples(crooked, st.sampled_from("abc")), min_size=1, max_size=4)),
    block=st.integers(1, 40),
    pixel=st.sampled_from([1.0, 0.5]),
)
def test_drawn_in_blocks_as_at_once(
    tmp_path_factory: pytest.TempPathFactory,
    drawing: tuple[bool, list[tuple[list[Place], str]]],
    block: int,
    pixel: float,
) -> None:
    """Also polygons that cross themselves or reach beyond the scene."""
    all_touched, polygons = drawing
    transform = Affine(pixel, 0, 1000.0, 0, -pixel, 9000.0)
    shapes = [shapely.Polygon([transform @ place for place in ring]) for ring, _ in polygons]
    path = tmp_path_factory.mktemp("drawn") / "all.gpkg"
    write_features(path, shapes, [kind for _, kind in polygons])
    grid = Grid(97, 88, transform, CRS.from_user_input(UTM))
    label = Vector.model_validate(VECTOR | {"all_touched": all_touched})
    features = VectorLabel(path, label, CLASSES, grid)
    rows = Rows(features.rows, grid.height, block, block)
    found = np.concatenate([rows.take(top, top + block) for top in range(0, 97, block)])
    # GDAL hits a pixel at the border for some slivers that pass its corner outside of the scene.
    scene = shapely.Polygon(grid.corners)
    burned = [(s, "abc".index(k)) for s, (_, k) in zip(shapes, polygons, strict=True)]
    burned = [(s, code) for s, code in burned if (s if s.is_valid else s.envelope).intersects(scene)]
    truth = rasterio.features.rasterize(
        burned or [(shapely.box(-2, -2, -1, -1), 0)],  # far away; it refuses to draw nothing
        (97, 88),
        fill=UNLABELLED,
        transform=transform,
        all_touched=all_touched,
        dtype="uint8",
    )
    assert np.array_equal(found, truth)


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_vertices_on_pixel_borders_hit_the_same_pixels_from_any_row(tmp_path: Path) -> None:
    """Places of 28.5 m pixels are no binary fractions; edges through pixel centres are decided once for all blocks."""
    transform = Affine(28.5, 0, 630534.0, 0, -28.5, 228114.0)
    grid = Grid(60, 60, transform, None)
    corners = [(3.5, 2.5), (40.5, 2.5), (40.5, 51.5), (3.5, 51.5)]
    label = Vector.model_validate({"kind": "vector", "pattern": "x"})
    path = tmp_path / "all.shp"
    write_features(path, [shapely.Polygon([transform @ place for place in corners])], ["a"], crs=None)
    features = VectorLabel(path, label, CLASSES[:1], grid)
    whole = features.rows(0, 60)
    for block in (1, 7, 32):
        parts = [features.rows(top, min(60, top + block)) for top in range(0, 60, block)]
        assert np.array_equal(np.concatenate(parts), whole)
    exact = shapely.Polygon([(col, -row) for col, row in corners])
    drawn = rasterio.features.rasterize([exact], (60, 60), transform=Affine.scale(1, -1), dtype="uint8")
    assert np.array_equal(whole == 0, drawn == 1)
