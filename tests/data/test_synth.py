"""Synthetic towns: reproducible, in the Potsdam layout, georeferenced, with every class in plausible amounts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.coords import BoundingBox

from shards.errors import InputError
from shards.synth import PALETTE, render, write_scenes

ISPRS = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "scenes"
    write_scenes(folder, scenes=8, size=128, seed=5)
    return folder


def test_layout_is_potsdam_and_pictures_are_returned_in_order(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    written = write_scenes(tmp_path / "a" / "b", 3, 64, 1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [path.name for path in written] == [f"top_potsdam_{i}_RGB.tif" for i in ("1_1", "1_2", "1_3")]
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == sorted([p.name for p in written] + [p.name.replace("RGB", "label") for p in written])


def test_same_seed_same_bytes_other_seed_other_scenes(eight: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "again", 8, 128, 5)
    assert _files(tmp_path / "again") == _files(eight)
    write_scenes(tmp_path / "other", 1, 128, 6)
    name = "top_potsdam_1_1_RGB.tif"
    with rasterio.open(tmp_path / "other" / name) as other, rasterio.open(eight / name) as one:
        assert (other.read() != one.read()).mean() > 0.5


def test_a_scene_depends_on_its_number_not_on_how_many_are_asked(eight: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, 2, 128, 5)
    few, many = _files(tmp_path), _files(eight)
    assert len(few) == 4
    assert few == {name: many[name] for name in few}


def test_writing_again_completes_a_folder(eight: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, 8, 128, 5)
    (tmp_path / "top_potsdam_1_2_label.tif").unlink()
    write_scenes(tmp_path, 8, 128, 5)
    assert _files(tmp_path) == _files(eight)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**40), scene=st.integers(0, 500), size=st.integers(64, 150))
def test_render_is_a_pure_function_of_its_arguments(seed: int, scene: int, size: int) -> None:
    picture, ids = render(seed, scene, size)
    again, ids_again = render(seed, scene, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert ids.shape == (size, size)
    assert ids.dtype == np.uint8
    assert ids.max() < len(ISPRS)
    assert np.array_equal(picture, again)
    assert np.array_equal(ids, ids_again)
    assert len(np.unique(picture)) > 30  # textured and lit, neither blank nor burnt out


def test_file_holds_what_render_gives_in_palette_colours(eight: Path) -> None:
    assert [tuple(color) for color in PALETTE.tolist()] == ISPRS
    picture, ids = render(5, 3, 128)
    with rasterio.open(eight / "top_potsdam_1_4_RGB.tif") as source:
        assert np.array_equal(source.read(), np.moveaxis(picture, -1, 0))
    with rasterio.open(eight / "top_potsdam_1_4_label.tif") as source:
        label = np.moveaxis(source.read(), 0, -1)
    assert {tuple(color) for color in np.unique(label.reshape(-1, 3), axis=0).tolist()} <= set(ISPRS)
    expected: npt.NDArray[np.uint8] = np.array(ISPRS, dtype=np.uint8)[ids]
    assert np.array_equal(label, expected)


def test_every_class_has_a_plausible_share() -> None:
    ids = np.concatenate([render(0, scene, 512)[1].ravel() for scene in range(4)])
    share = np.bincount(ids, minlength=6) / ids.size
    low = np.array([0.15, 0.08, 0.10, 0.05, 0.003, 0.005])
    high = np.array([0.55, 0.40, 0.45, 0.30, 0.06, 0.15])
    assert ((share > low) & (share < high)).all(), share


def test_scenes_differ_in_light_and_season() -> None:
    """Road brightness and vegetation hue vary between scenes much more than two halves of one scene do."""
    between, within = [], []
    for scene in range(10):
        picture, ids = render(0, scene, 256)
        halves = []
        for part in (slice(0, 128), slice(128, 256)):
            road = picture[part][ids[part] == 0].mean()
            green = picture[part][np.isin(ids[part], (2, 3))].mean(axis=0)
            halves.append([road / 255.0, green[0] / green[1]])
        between.append(np.mean(halves, axis=0))
        within.append(np.subtract(halves[0], halves[1]))
    assert (np.std(between, axis=0) > 0.04).all()
    assert (np.std(between, axis=0) > np.std(within, axis=0) / np.sqrt(2.0)).all()


def test_georeferenced_and_neighbours_touch_without_overlap(eight: Path) -> None:
    bounds: dict[str, BoundingBox] = {}
    for path in sorted(eight.glob("*_RGB.tif")):
        with rasterio.open(path) as source, rasterio.open(str(path).replace("RGB", "label")) as label:
            assert source.crs.to_epsg() == 32633
            assert source.transform == label.transform
            assert source.crs == label.crs
            assert 0.05 <= source.transform.a <= 0.5
            assert source.transform.e == -source.transform.a
            assert source.count == label.count == 3
            assert source.dtypes == ("uint8",) * 3
            assert source.profile["tiled"]
            assert source.profile["compress"] == "deflate"
            match = re.fullmatch(r"top_potsdam_(\d+_\d+)_RGB\.tif", path.name)
            assert match is not None
            bounds[match[1]] = source.bounds
    assert len(bounds) == 8
    assert bounds["1_1"].right == bounds["1_2"].left
    assert bounds["1_1"].bottom == bounds["2_1"].top
    boxes = list(bounds.values())
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert min(a.right, b.right) <= max(a.left, b.left) or min(a.top, b.top) <= max(a.bottom, b.bottom)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 128, 0), "scenes is 0"), ((2, 63, 0), "size is 63"), ((2, 128, -1), "seed is -1")],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    tmp_path: Path, arguments: tuple[int, int, int], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        write_scenes(tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_render_refuses_bad_arguments() -> None:
    with pytest.raises(InputError, match="size is 10"):
        render(0, 0, 10)
    with pytest.raises(InputError, match="scene is -1"):
        render(0, -1, 64)


@pytest.mark.parametrize(("size", "seed"), [(64, 8), (96, 7)])
def test_scenes_of_another_seed_or_size_are_not_mixed(tmp_path: Path, size: int, seed: int) -> None:
    write_scenes(tmp_path, 2, 64, 7)
    before = _files(tmp_path)
    with pytest.raises(InputError, match=r"top_potsdam_1_1_RGB.tif.*seed 7, size 64"):
        write_scenes(tmp_path, 3, size, seed)
    assert _files(tmp_path) == before


def test_real_scenes_are_never_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "top_potsdam_2_10_RGB.tif"
    mine.write_bytes(b"precious")
    with pytest.raises(InputError, match=r"top_potsdam_2_10_RGB\.tif"):
        write_scenes(tmp_path, 1, 64, 0)
    assert _files(tmp_path) == {mine.name: b"precious"}


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=re.escape(str(out))):
            write_scenes(out, 1, 64, 0)


def test_an_interrupted_write_leaves_no_scene_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_scenes(tmp_path, 1, 64, 0)
    assert _files(tmp_path) == {}
