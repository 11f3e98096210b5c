"""`dctc evaluate --scenes`: whole predicted scenes against labels, with and without class boundaries."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion
from sklearn.metrics import confusion_matrix

from dctc.whole_scenes.boundaries import STRIP, near_boundary
from dctc.whole_scenes.source import open_source
from shards.index import Index, tile_name
from shards.manifest import Dataset
from shards.recipe import load_recipe
from shards.scenes import find_scenes
from shards.tiles import read_tile
from tests.system.oracle import COLORS
from tests.tiny import ROOT, run

STACK = r"""
image: {pattern: '(?P<scene>\d+_\d+)_(?P<band>[rgba])\.tif', files: [r, g, b, a]}
label: {pattern: '.*top_potsdam_(?P<scene>\d+_\d+)_label\.tif', kind: palette}
mask: {pattern: '(?P<scene>\d+_\d+)_mask\.tif', applies_to: image}
bands: {names: [red, green, blue], keep: [1, 2, 3]}
nodata: {value: 0, match: any, alpha: 4}
tile: {size: 32, edge: pad}
splits: {protocol: scene, scene: {test_share: 0.4, val_share: 0.1}}
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path, tiny_model: Path) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("scored") / "scores"
    done = run(
        "dctc", "evaluate", tiny_model, tiny_dataset, "--scenes", "--root", tiny_dataset.parent / "scenes",
        "--out", out, "--json",
    )  # fmt: skip
    return out, json.loads(done.stdout)


def eroded_by_scipy(labels: NDArray[np.uint8], radius: int = 3) -> NDArray[np.bool_]:
    """Pixels that no class keeps when its mask, with what is ignored counted in, is eroded by a disc."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = x * x + y * y <= radius * radius
    kept = np.zeros(labels.shape, bool)
    for code in np.unique(labels[labels != 255]):
        kept |= (labels == code) & binary_erosion((labels == code) | (labels == 255), disc, border_value=1)
    near: NDArray[np.bool_] = ~kept & (labels != 255)
    return near


def truth_of(path: Path) -> NDArray[np.uint8]:
    with rasterio.open(path) as file:
        colors = file.read()
    ids = np.full(colors.shape[1:], 255, np.uint8)
    for code, color in enumerate(COLORS):
        ids[(colors == np.array(color)[:, None, None]).all(0)] = code
    assert (ids != 255).all()
    return ids


def test_scores_are_those_of_the_maps(scored: tuple[Path, Any], tiny_dataset: Path, tiny_model: Path) -> None:
    out, record = scored
    found = record["scenes"]
    assert record["nets"].keys() >= {"s1", "teacher"}  # tile scores stand beside
    assert found["net"] == "s1"
    assert len(found["scenes"]) >= 1
    totals = {part: np.zeros((6, 6), np.int64) for part in ("all", "eroded")}
    for name, scores in found["scenes"].items():
        (label,) = (tiny_dataset.parent / "scenes").rglob(f"top_potsdam_{name}_label.tif")
        truth = truth_of(label)
        run("dctc", "predict", tiny_model, label.with_name(label.name.replace("label", "RGB")), "--out", out / "again")
        with rasterio.open(out / "again" / f"top_potsdam_{name}_RGB_classes.tif") as file:
            predicted = file.read(1)
        for part, kept in (("all", truth != 255), ("eroded", ~eroded_by_scipy(truth))):
            wanted = confusion_matrix(truth[kept], predicted[kept], labels=range(6))
            assert scores[part]["matrix"] == wanted.tolist()
            totals[part] += wanted
        assert scores["unpredicted"] == 0
    for part, matrix in totals.items():
        assert found["total"][part]["matrix"] == matrix.tolist()
    assert found["total"]["eroded"]["pixels"] < found["total"]["all"]["pixels"]


def test_files(scored: tuple[Path, Any]) -> None:
    out, record = scored
    with (out / "test-scenes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["scene"] for row in rows[::2]] == [*record["scenes"]["scenes"], "total"]
    assert float(rows[-1]["miou"]) == record["scenes"]["total"]["eroded"]["miou"]
    for end in ("", "-eroded"):
        assert (out / f"test-scenes-total{end}.csv").exists()
        assert (out / f"test-scenes-total{end}-confusion.png").stat().st_size > 1000
    for name, picture in record["scenes"]["pictures"].items():
        pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
        red = (pixels == (200, 20, 30)).all(1).sum()
        green = (pixels == (225, 240, 225)).all(1).sum()
        assert red / (red + green) == pytest.approx(1 - record["scenes"]["scenes"][name]["all"]["pa"], abs=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_boundaries_are_an_erosion(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, (STRIP // 10 + 9, 9), np.uint8).repeat(10, 0).repeat(11, 1)  # longer than a strip
    labels[random.random(labels.shape) < 0.1] = 255
    assert len(labels) > STRIP
    assert (near_boundary(labels) == eroded_by_scipy(labels)).all()


def test_what_cannot_be(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    for more, said in (
        (["--scenes", "--root", tmp_path], "no file matches the image pattern"),
        (["--root", tmp_path], "--root and --net are for --scenes"),
    ):
        done = run("dctc", "evaluate", tiny_model, tiny_dataset, *more, "--out", tmp_path / "out", check=False)
        assert done.returncode == 2
        assert said in done.stderr
    by_tile = tmp_path / "tiles"
    recipe = "configs/data/synthetic.yaml"
    scenes = tiny_dataset.parent / "scenes"
    run("dctc", "shard", recipe, by_tile, "--root", scenes, "--workers", 1, "tile.size=32", "splits.protocol=paper")
    done = run("dctc", "evaluate", tiny_model, by_tile, "--scenes", "--root", scenes, check=False)
    assert done.returncode == 2
    assert "has tiles in test and in train" in done.stderr


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """Towns as stacks of single-band files with every way to say "no data": one band's value, alpha, a mask."""
    folder = tmp_path_factory.mktemp("stacks")
    for label in (tiny_dataset.parent / "scenes").rglob("*_label.tif"):
        name = label.name.removeprefix("top_potsdam_").removesuffix("_label.tif")
        with rasterio.open(label.with_name(label.name.replace("label", "RGB"))) as file:
            bands, profile = file.read().clip(1), {**file.profile, "count": 1, "photometric": None}
        layers = dict(zip("rgb", bands, strict=True)) | {k: np.full_like(bands[0], 255) for k in ("a", "mask")}
        for key, place in (("g", np.s_[5:20, 3:60]), ("a", np.s_[40:70, 10:30]), ("mask", np.s_[80:, 50:])):
            layers[key][place] = 0
        for key, pixels in layers.items():
            with rasterio.open(folder / f"{name}_{key}.tif", "w", **profile) as file:
                file.write(pixels, 1)
        (folder / label.name).write_bytes(label.read_bytes())
    recipe = yaml.safe_load((ROOT / "configs" / "data" / "synthetic.yaml").read_text()) | yaml.safe_load(STACK)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("dctc", "shard", folder / "recipe.yaml", folder / "dataset", "--root", folder, "--workers", 1)
    return folder


def test_rows_are_those_of_the_packed_tiles(stacks: Path) -> None:
    dataset, recipe = Dataset.open(stacks / "dataset"), load_recipe(stacks / "recipe.yaml")
    index = Index.open(dataset)
    scenes = {scene.id: scene for scene in find_scenes(recipe, stacks)}
    seen = 0
    for row in range(len(index)):
        tile = read_tile(dataset, index, row)
        top, left = (tile.meta["window"][key] for key in ("row", "col"))
        with open_source(recipe, stacks, scenes[tile.meta["scene"]], "uint8") as source:
            values, valid = source.read(top, top + 32)
        assert (values[:, :, left : left + 32] == tile.image).all(), tile_name(dataset, index, row)
        assert (valid[:, left : left + 32] == tile.valid).all()
        seen += int((~tile.valid).sum())
    assert seen == len(scenes) * (15 * 57 + 30 * 20 + 16 * 46)


def test_maps_have_no_data_where_training_has_none(stacks: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = run("dctc", "evaluate", tiny_model, stacks / "dataset", "--scenes", "--root", stacks, "--out", tmp_path,
               "--json")  # fmt: skip
    record = json.loads(done.stdout)["scenes"]
    hidden = np.zeros((96, 96), bool)
    hidden[5:20, 3:60] = hidden[40:70, 10:30] = hidden[80:, 50:] = True
    totals = record["total"]
    assert totals["all"]["pixels"] == len(record["scenes"]) * int((~hidden).sum())
    assert totals["unpredicted"] == 0  # what training does not see has no label either
    for name, picture in record["pictures"].items():
        with rasterio.open(tmp_path / "maps" / f"{name}_r_classes.tif") as file:
            assert ((file.read(1) == 255) == hidden).all()
            with rasterio.open(stacks / f"{name}_r.tif") as image:
                assert (file.crs, file.transform) == (image.crs, image.transform)
        assert Path(picture).name == f"{name}_r_errors.png"


def test_an_unknown_net_is_said_at_once(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = run(
        "dctc", "evaluate", tiny_model, tiny_dataset, "--scenes", "--root", tiny_dataset.parent / "scenes", "--net",
        "s9", "--out", tmp_path / "out", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "net 's9' is not in this model: it has s1, s2" in done.stderr
    assert not (tmp_path / "out").exists()
