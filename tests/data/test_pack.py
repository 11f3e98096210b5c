from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from rasterio.crs import CRS

from shards.index import Index
from shards.manifest import SPLITS, Dataset, dump_manifest, parse_manifest
from shards.pack import Packed, pack
from shards.recipe import Recipe
from shards.tiles import read_tile
from tests.data import layouts
from tests.data.conftest import SCENES
from tests.data.own import labels, packed_from

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def test_potsdam(packed: Packed, towns: Path) -> None:
    manifest = packed.manifest
    assert manifest.scenes == sorted([*SCENES, "7_12"])
    assert {name: info.tiles for name, info in manifest.splits.items()} == {"train": 80, "val": 16, "test": 16}
    assert {name: info.labelled for name, info in manifest.splits.items()} == {"train": 64, "val": 16, "test": 16}
    assert {name: info.scenes for name, info in manifest.splits.items()} == {"train": 5, "val": 1, "test": 1}
    found = labels(packed, 200, 200)
    for number, scene in enumerate(SCENES):
        assert np.array_equal(found[scene], layouts.random_ids(6, 200, 200, number))
    assert not list(packed.root.glob(".staging*"))


def test_places_come_from_the_world_files(packed: Packed) -> None:
    index = Index.open(packed)
    seen = set()
    for row in range(len(index)):
        meta = read_tile(packed, index, row).meta
        number = [*SCENES, "7_12"].index(meta["scene"])
        expected = (366676.0 + 300 * number + 0.05 * meta["window"]["col"], 5808000.0 - 0.05 * meta["window"]["row"])
        assert (meta["transform"][2], meta["transform"][5]) == pytest.approx(expected, abs=1e-6)
        assert meta["crs"] is None
        assert (meta["bands"], meta["window"]["height"]) == (["red", "green", "blue"], 64)
        seen.add((meta["scene"], meta["window"]["row"], meta["window"]["col"]))
    assert len(seen) == len(index)


def test_class_pixels_and_ignored_add_up(packed: Packed) -> None:
    for name, info in packed.manifest.splits.items():
        assert sum(info.pixels) == 200 * 200 * (info.labelled // 16), name
        reasons = {reason for reason, count in info.ignored.items() if count}
        assert reasons == ({"padding"} if info.labelled else set())
        assert info.ignored["padding"] == (256 * 256 - 200 * 200) * info.labelled // 16


def test_statistics_are_those_of_the_training_pixels(packed: Packed) -> None:
    train = [n for n, scene in enumerate([*SCENES, "7_12"]) if scene not in ("2_13", "7_7")]
    pixels = np.concatenate([layouts.random_image(3, 200, 200, n).reshape(3, -1) for n in train], axis=1)
    for band, values in zip(packed.manifest.bands, pixels.astype(np.float64), strict=True):
        assert band.mean == pytest.approx(values.mean(), rel=1e-13)
        assert band.std == pytest.approx(values.std(), rel=1e-12)
        assert (band.minimum, band.maximum) == (values.min(), values.max())
        for percent, value in band.percentiles.items():
            assert value == pytest.approx(np.percentile(values, int(percent)))


def test_images_are_the_scenes_pixels(packed: Packed) -> None:
    index = Index.open(packed)
    for row in index.rows("test").tolist():
        tile = read_tile(packed, index, row)
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        expected = layouts.random_image(3, 200, 200, SCENES.index("2_13"))[:, top : top + 64, left : left + 64]
        assert np.array_equal(tile.image[:, : expected.shape[1], : expected.shape[2]], expected)
        assert tile.valid.sum() == expected[0].size
        assert index.valid_share[row] == pytest.approx(tile.valid.mean(), rel=1e-6)
        assert (index.valid_share[row] < 1) == (not tile.valid.all())


def test_shards_are_even_and_mix_scenes(packed: Packed) -> None:
    index = Index.open(packed)
    for split in SPLITS:
        counts = [shard.tiles for shard in packed.manifest.shards if shard.split == split]
        assert max(counts) - min(counts) <= 1
    train = [n for n, shard in enumerate(packed.manifest.shards) if shard.split == "train"]
    assert len(train) > 3
    for number in train:
        rows = np.flatnonzero(index.shard == number)
        assert set(index.split[rows].tolist()) == {0}
        assert len(set(index.scene[rows].tolist())) >= 3


def test_lossy_label_and_wrong_car_colour(tmp_path: Path) -> None:
    truth = layouts.potsdam(tmp_path / "in", ["4_12", "6_7", "2_13"])
    lossy = layouts.colored(truth["4_12"], layouts.ISPRS).astype(int)
    lossy += np.random.default_rng(0).integers(-40, 41, lossy.shape)
    lossy[:, :2] = 140  # grey: further than the tolerance from 0 and from 255
    folder = tmp_path / "in" / "5_Labels_all"
    layouts.write_tiff(folder / "top_potsdam_4_12_label.tif", lossy.clip(0, 255).astype(np.uint8))
    cars = layouts.colored(truth["6_7"], layouts.ISPRS)
    cars[0][truth["6_7"] == 4] = 252
    layouts.write_tiff(folder / "top_potsdam_6_7_label.tif", cars)
    packed = packed_from(layouts.recipe("potsdam"), tmp_path / "in", tmp_path)
    found = labels(packed, 200, 200)
    assert np.array_equal(found["6_7"], truth["6_7"])
    assert np.array_equal(found["4_12"][2:], truth["4_12"][2:])
    assert (found["4_12"][:2] == 255).all()
    assert packed.manifest.splits["train"].ignored["unmatched"] == 400
    (report,) = packed.report.unmatched
    assert (report.scene, report.count, report.share) == ("4_12", 400, 0.01)
    assert report.values == [("140,140,140", 400)]
    assert any("scene 4_12: 400 label pixels (1.000%)" in line for line in packed.report.lines())
    assert "2_10" in packed.report.idle_patterns
    assert any("split patterns name no scene" in line for line in packed.report.lines())


def test_vaihingen_sizes_vary(tmp_path: Path) -> None:
    sizes = {1: (130, 100), 2: (64, 64), 3: (40, 30), 5: (64, 129)}
    truth = layouts.vaihingen(tmp_path / "in", sizes)
    packed = packed_from(layouts.recipe("vaihingen"), tmp_path / "in", tmp_path)
    assert {name: info.tiles for name, info in packed.manifest.splits.items()} == {
        "train": 6 + 1 + 3,
        "val": 0,
        "test": 1,
    }
    index = Index.open(packed)
    for row in range(len(index)):
        tile = read_tile(packed, index, row)
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        expected = truth[int(tile.meta["scene"][4:])][top : top + 64, left : left + 64]
        assert tile.label is not None
        assert np.array_equal(tile.label[: expected.shape[0], : expected.shape[1]], expected)
        assert (tile.label == 255).sum() == 64 * 64 - expected.size
        assert CRS.from_wkt(tile.meta["crs"]).to_epsg() == 32632


@pytest.mark.parametrize("nir", [False, True])
def test_gid(tmp_path: Path, nir: bool) -> None:
    truth = layouts.gid(tmp_path / "in", 10, 96, 128, nir)
    packed = packed_from(layouts.recipe("gid5_nir" if nir else "gid5"), tmp_path / "in", tmp_path)
    assert {name: info.scenes for name, info in packed.manifest.splits.items()} == {"train": 7, "val": 1, "test": 2}
    found = labels(packed, 96, 128)
    for scene, ids in truth.items():
        assert np.array_equal(found[scene], ids)
    total = sum(info.ignored["ignore_value"] for info in packed.manifest.splits.values())
    assert total == 10 * 96 * 32, "black is not labelled; near infrared of 0 is no missing data"
    assert [band.name for band in packed.manifest.bands] == (["nir"] if nir else []) + ["red", "green", "blue"]


def test_paper_protocol_draws_a_tenth_of_the_tiles(hamlet: Path, tmp_path: Path) -> None:
    packed = packed_from(layouts.recipe("potsdam", "splits.protocol=paper"), hamlet, tmp_path)
    splits = packed.manifest.splits
    assert (splits["test"].tiles, splits["test"].labelled, splits["train"].tiles) == (3, 3, 29)
    recipe = layouts.recipe("potsdam", "splits.protocol=paper", "splits.seed=1", "splits.paper.val_share=0.2")
    other = pack(recipe, hamlet, tmp_path / "other")
    assert [info.tiles for _, info in sorted(other.manifest.splits.items())] == [3, 23, 6]
    assert set(Index.open(packed).rows("test").tolist()) != set(Index.open(other).rows("test").tolist())


@pytest.mark.parametrize(("edge", "tiles"), [("pad", 16), ("shift", 16), ("drop", 9)])
def test_edges(hamlet: Path, tmp_path: Path, edge: str, tiles: int) -> None:
    packed = packed_from(layouts.recipe("potsdam", f"tile.edge={edge}"), hamlet, tmp_path)
    assert packed.manifest.splits["test"].tiles == tiles
    index = Index.open(packed)
    assert bool((index.valid_share == 1).all()) == (edge != "pad")
    ends = {read_tile(packed, index, row).meta["window"]["row"] for row in index.rows("test").tolist()}
    assert ends == {"pad": {0, 64, 128, 192}, "shift": {0, 64, 128, 136}, "drop": {0, 64, 128}}[edge]


def test_overlapping_tiles(hamlet: Path, tmp_path: Path) -> None:
    packed = packed_from(layouts.recipe("potsdam", "tile.stride=32", "tile.edge=drop"), hamlet, tmp_path)
    index = Index.open(packed)
    assert packed.manifest.splits["test"].tiles == 25
    for row in index.rows("test").tolist():
        tile = read_tile(packed, index, row)
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        assert tile.label is not None
        assert np.array_equal(tile.label, layouts.random_ids(6, 200, 200, 1)[top : top + 64, left : left + 64])


def test_slivers_are_dropped(hamlet: Path, tmp_path: Path) -> None:
    packed = packed_from(layouts.recipe("potsdam", "tile.min_valid_share=0.2"), hamlet, tmp_path)
    assert packed.manifest.splits["test"].tiles == 9  # 8 of 64 columns are an eighth
    assert packed.report.dropped == 2 * 7


def test_shares_have_every_class_and_survive_repacking(packed: Packed, towns: Path, tmp_path: Path) -> None:
    index = Index.open(packed)
    labelled = packed.manifest.labelled
    assert labelled.total == 64
    assert labelled.shares["1/8"] == 8
    assert all(missing == [] for missing in labelled.missing.values())
    previous: list[int] = []
    for share in (Fraction(1, 64), Fraction(1, 8), Fraction(1, 3), Fraction(1)):
        rows = index.labelled_rows(share).tolist()
        assert rows[: len(previous)] == previous
        assert set(index.split[rows].tolist()) == {0}
        previous = rows
    repacked = Index.open(pack(packed_recipe("shards.megabytes=8"), towns, tmp_path / "again"))
    assert np.array_equal(repacked.labelled_rank, index.labelled_rank)
    assert np.array_equal(repacked.key_hash, index.key_hash)


def packed_recipe(*overrides: str) -> Recipe:
    return layouts.recipe("potsdam", 'splits.scene.val=["7_7"]', *overrides)


def test_unlabelled_rows(packed: Packed) -> None:
    index = Index.open(packed)
    train = set(index.rows("train").tolist())
    for share in (Fraction(1, 8), Fraction(1, 2), Fraction(1)):
        others = index.unlabelled_rows(share).tolist()
        assert others == sorted(others)
        assert set(others) == train - set(index.labelled_rows(share).tolist())
    # the scene without a label is still there at share 1
    assert {packed.manifest.scenes[s] for s in index.scene[index.unlabelled_rows(Fraction(1))]} == {"7_12"}


def test_share_one_without_other_tiles_uses_the_labelled_ones(tmp_path: Path) -> None:
    layouts.potsdam(tmp_path / "in", ["2_10", "2_13"])
    index = Index.open(packed_from(layouts.recipe("potsdam"), tmp_path / "in", tmp_path))
    assert index.unlabelled_rows(Fraction(1)).tolist() == index.rows("train").tolist()
    assert sorted(index.labelled_rows(Fraction(1)).tolist()) == index.rows("train").tolist()


def test_manifest_round_trip(packed: Packed) -> None:
    raw = dump_manifest(packed.manifest)
    assert raw == (packed.root / "manifest.json").read_bytes()
    assert parse_manifest(raw, packed.root) == packed.manifest
    assert Dataset.open(packed.root).digest == packed.digest


def test_plan_names_inputs_and_recipe(packed: Packed, towns: Path) -> None:
    raw = (packed.root / "plan.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == packed.manifest.plan_sha256
    plan = json.loads(raw)
    inputs = [entry for scene in plan["scenes"] for entry in scene["inputs"]]
    assert len(inputs) == 26  # each with its world file
    for entry in inputs:
        data = (towns / entry["path"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert plan["recipe_sha256"] == layouts.recipe("potsdam", "shards.megabytes=0.1", 'splits.scene.val=["7_7"]').digest
