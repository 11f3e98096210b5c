"""`dctc suggest`: which tiles to label next, as footprints and as lists that `dctc shard` takes back."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import torch

from dctc.bundle import Bundle
from dctc.suggest.choose import spread, suggest
from dctc.suggest.files import _corners, write_footprints
from shards.index import Index, tile_name
from shards.manifest import Dataset
from shards.tiles import read_tile
from tests.data.test_faults import small_disk
from tests.tiny import ROOT, run, write_config

RECIPE = ROOT / "configs" / "data" / "synthetic.yaml"


def suggested(dataset: Path, model: Path, out: Path, budget: int, *more: object) -> dict[str, Any]:
    done = run("dctc", "suggest", dataset, model, "--budget", budget, "--out", out, "--json", *more)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def keys(dataset: Dataset, rows: list[int]) -> list[str]:
    index = Index.open(dataset)
    return [tile_name(dataset, index, row) for row in rows]


def test_a_suggestion_is_packed_and_trained_on(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    record = suggested(tiny_dataset, tiny_model, tmp_path / "a" / "tiles.gpkg", 6, "--labelled-share", "1/8")
    old = Dataset.open(tiny_dataset)
    start = keys(old, Index.open(old).labelled_rows(Fraction(1, 8)).tolist())
    tiles = [tile["tile"] for tile in record["tiles"]]
    assert len(set(tiles)) == 6
    assert not set(tiles) & set(start)
    run(
        "dctc", "shard", RECIPE, tmp_path / "new", "--root", tiny_dataset.parent / "scenes", "--workers", 1,
        "tile.size=32", *record["shard_overrides"],
    )  # fmt: skip
    new = Dataset.open(tmp_path / "new")
    index = Index.open(new)
    learnt = index.labelled_rows(Fraction(record["labelled_share"]))
    assert keys(new, learnt.tolist()) == [*start, *tiles]
    for split in ("train", "val", "test"):
        before = keys(old, Index.open(old).rows(split).tolist())
        assert keys(new, index.rows(split).tolist()) == before
    share = {"dataset": str(tmp_path / "new"), "labelled_share": record["labelled_share"]}
    config = write_config(tmp_path / "again.yaml", tmp_path / "new", data=share, schedule={"rounds": 1})
    run("dctc", "train", config)
    assert (tmp_path / "runs" / "synthetic-files" / "again" / "model.safetensors").exists()


@pytest.mark.matrix
@pytest.mark.slow
def test_scenes_without_any_label(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Half of the scenes have no label file; an annotator then draws the suggested tiles alone."""
    scenes = Path(shutil.copytree(tiny_dataset.parent / "scenes", tmp_path / "scenes"))
    labels = sorted(scenes.rglob("*_label.tif"))
    drawn = {path: path.with_suffix(".later") for path in labels[::2]}
    for path, later in drawn.items():
        path.rename(later)
    pack = ("--root", scenes, "--workers", 1, "tile.size=32", "label.ignore_colors=[[1, 2, 3]]")
    run("dctc", "shard", RECIPE, tmp_path / "old", *pack)
    old = Dataset.open(tmp_path / "old")
    index = Index.open(old)
    start = keys(old, index.labelled_rows(Fraction(1)).tolist())
    bare = {path.name.removeprefix("top_potsdam_").removesuffix("_label.tif") for path in drawn}
    record = suggested(tmp_path / "old", tiny_model, tmp_path / "tiles.gpkg", 6)
    assert record["labelled"] == len(start) > 0
    assert record["candidates"] == len(index.rows("train")) - len(start)
    assert record["labelled_share"] == "1"
    assert {tile["scene"] for tile in record["tiles"]} == bare  # the others have more labels than six could give
    for path, later in drawn.items():
        name = path.name.removeprefix("top_potsdam_").removesuffix("_label.tif")
        with rasterio.open(later) as file:
            colors, profile = file.read(), file.profile
        unlabelled = np.full_like(colors, 0) + np.array([1, 2, 3], np.uint8)[:, None, None]
        for tile in record["tiles"]:
            if tile["scene"] == name:
                window = np.s_[:, tile["row"] : tile["row"] + 32, tile["col"] : tile["col"] + 32]
                unlabelled[window] = colors[window]
        with rasterio.open(path, "w", **profile) as file:
            file.write(unlabelled)
    run("dctc", "shard", RECIPE, tmp_path / "new", *pack, *record["shard_overrides"])
    new = Dataset.open(tmp_path / "new")
    learnt = keys(new, Index.open(new).labelled_rows(Fraction(1)).tolist())
    assert learnt == [*start, *(tile["tile"] for tile in record["tiles"])]
    for split in ("train", "val", "test"):
        assert keys(new, Index.open(new).rows(split).tolist()) == keys(old, index.rows(split).tolist())
    share = {"dataset": str(tmp_path / "new"), "labelled_share": record["labelled_share"]}
    run("dctc", "train", write_config(tmp_path / "again.yaml", tmp_path / "new", data=share, schedule={"rounds": 1}))
    assert (tmp_path / "runs" / "synthetic-files" / "again" / "model.safetensors").exists()
    with_all = run(
        "dctc", "suggest", tmp_path / "new", tiny_model, "--budget", 3, "--out", tmp_path / "next.gpkg", "--json"
    )
    again = json.loads(with_all.stdout)
    assert not {tile["tile"] for tile in again["tiles"]} & set(learnt)


def test_imagery_alone(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    """No label and no class in the recipe: a first suggestion, packed with its labels when they are there."""
    scenes = tiny_dataset.parent / "scenes"
    run("dctc", "shard", RECIPE, tmp_path / "old", "--root", scenes, "--workers", 1, "tile.size=32", "label=null")
    old = Dataset.open(tmp_path / "old")
    record = suggested(tmp_path / "old", tiny_model, tmp_path / "tiles.gpkg", 9)
    assert (record["labelled"], record["candidates"]) == (0, len(Index.open(old)))
    run("dctc", "shard", RECIPE, tmp_path / "new", "--root", scenes, "--workers", 1, "tile.size=32",
        *record["shard_overrides"])  # fmt: skip
    new = Dataset.open(tmp_path / "new")
    first = Index.open(new).labelled_rows(Fraction(9, new.manifest.labelled.total))
    assert keys(new, first.tolist()) == [tile["tile"] for tile in record["tiles"]]


def test_the_same_files_each_time(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    files = []
    for name, batch in (("a", 8), ("b", 8), ("c", 3)):
        suggested(tiny_dataset, tiny_model, tmp_path / name / "t.gpkg", 5, "--labelled-share", "1/4", "--batch", batch)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert files[0].keys() == {"t.gpkg", "t.txt", "t_train.txt", "t_val.txt", "t_test.txt"}
    assert files[0]["t.txt"] == files[2]["t.txt"]


def test_footprints_lie_on_their_pixels(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    record = suggested(tiny_dataset, tiny_model, tmp_path / "t.gpkg", 7, "--labelled-share", "1/8")
    assert record["layers"] == ["tiles"]
    meta, _, shapes, columns = pyogrio.raw.read(tmp_path / "t.gpkg", layer="tiles")
    table = dict(zip(meta["fields"], columns, strict=True))
    assert table["tile"].tolist() == [tile["tile"] for tile in record["tiles"]]
    assert table["rank"].tolist() == list(range(1, 8))
    assert table["score"].tolist() == sorted(table["score"], reverse=True)
    assert {"entropy", "disagreement"} <= table.keys()
    for scene, row, col, shape in zip(table["scene"], table["row"], table["col"], shapes, strict=True):
        (image,) = (tiny_dataset.parent / "scenes").rglob(f"top_potsdam_{scene}_RGB.tif")
        with rasterio.open(image) as file:
            assert rasterio.crs.CRS.from_user_input(meta["crs"]) == file.crs
            wanted = shapely.Polygon([file.transform * at for at in ((col, row), (col + 32, row), (col + 32, row + 32),
                                                                    (col, row + 32))])  # fmt: skip
        assert shapely.from_wkb(shape).equals_exact(wanted, 1e-6)


def test_no_label_is_read(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    dataset = Dataset.open(copy)
    index = Index.open(dataset)
    for row in range(len(index)):
        if index.label_size[row]:
            with (copy / dataset.manifest.shards[int(index.shard[row])].name).open("r+b") as shard:
                shard.seek(int(index.label_offset[row]))
                shard.write(b"\xff" * int(index.label_size[row]))
    files = []
    for source, name in ((tiny_dataset, "a"), (copy, "b")):
        suggested(source, tiny_model, tmp_path / name / "t.gpkg", 5, "--labelled-share", "1/4")
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


def test_scores_are_the_models(tiny_dataset: Path, tiny_model: Path) -> None:
    dataset, bundle = Dataset.open(tiny_dataset), Bundle.load(tiny_model)
    found = suggest(bundle, dataset, 3, share=Fraction(1, 8)).scored
    assert found.disagreement is not None
    for place, row in enumerate(found.rows.tolist()):
        tile = read_tile(dataset, Index.open(dataset), row)
        nets = bundle.logits(torch.from_numpy(tile.image)[None])
        p = nets[bundle.headline].double().softmax(1)
        doubt = torch.special.entr(p).sum(1).mean().item()
        quarrel = (nets["s1"].argmax(1) != nets["s2"].argmax(1)).double().mean().item()
        assert found.entropy[place] == pytest.approx(doubt, rel=1e-4)
        assert found.disagreement[place] == pytest.approx(quarrel, abs=1e-9)
        assert found.score[place] == pytest.approx((doubt / np.log(6) + quarrel) / 2, abs=1e-4)


def test_equal_quotas() -> None:
    score = np.array([9.0, 8, 7, 6, 5, 4, 3, 2])
    scenes = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    none = np.array([], np.int64)
    assert spread(score, scenes, 3, none).tolist() == [0, 4, 6]  # one a scene
    assert spread(score, scenes, 2, none).tolist() == [0, 4]  # the best of those
    assert spread(score, scenes, 5, none).tolist() == [0, 1, 4, 5, 6]
    assert spread(score, scenes, 7, none).tolist() == [0, 1, 2, 4, 5, 6, 7]  # scenes 1 and 2 have no third
    assert spread(score, scenes, 8, none).tolist() == list(range(8))
    assert spread(np.zeros(4), np.array([1, 1, 0, 0]), 2, none).tolist() == [0, 2]  # ties: the first


def test_a_quota_counts_what_is_labelled() -> None:
    score = np.array([9.0, 8, 7, 6, 5, 4, 3, 2])
    scenes = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    assert spread(score, scenes, 2, np.array([0])).tolist() == [4, 6]  # scenes without a label
    assert spread(score, scenes, 3, np.array([0])).tolist() == [0, 4, 6]  # and then one more
    assert spread(score, scenes, 4, np.array([0, 0, 2])).tolist() == [0, 4, 5, 6]
    assert spread(score, scenes, 2, np.array([1, 1, 2, 7])).tolist() == [0, 1]
    assert spread(np.array([9.0, 8, 1]), np.array([0, 0, 1]), 2, np.array([2])).tolist() == [
        0,
        2,
    ]  # low, but not left out
    assert spread(score, scenes, 8, np.array([0, 1, 1, 1])).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "3"], "every training tile has a label; name the share"),
        (["--budget", "9999", "--labelled-share", "1/8"], "--budget 9999"),
        (["--budget", "3", "--labelled-share", "2"], "outside (0, 1]"),
        (["--budget", "3", "--labelled-share", "1/8", "--net", "s9"], "net 's9' is not in this model: it has"),
    ],
)
def test_what_cannot_be(tiny_dataset: Path, tiny_model: Path, tmp_path: Path, more: list[str], said: str) -> None:
    done = run("dctc", "suggest", tiny_dataset, tiny_model, *more, "--out", tmp_path / "t.gpkg", check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 16):
        (tmp_path / "disk" / "fill").write_bytes(bytes(48_000))
        out = tmp_path / "disk" / "next.gpkg"
        done = run(
            "dctc",
            "suggest",
            tiny_dataset,
            tiny_model,
            "--budget",
            "9",
            "--labelled-share",
            "1/8",
            "--out",
            out,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert f"error: {out}: cannot be written" in done.stderr
        assert [path.name for path in out.parent.iterdir()] == ["fill"]


def test_a_layer_for_each_crs(tmp_path: Path) -> None:
    window = {"row": 64, "col": 32, "height": 32, "width": 32}
    places = [("EPSG:32633", [2.0, 0, 400_000, 0, -2, 5_800_000]), (None, [1.0, 0, 32, 0, 1, 64]),
              ("EPSG:4326", [1e-5, 0, 13, 0, -1e-5, 52])]  # fmt: skip
    records = []
    for rank, (crs, transform) in enumerate(places, 1):
        wkt = None if crs is None else rasterio.crs.CRS.from_string(crs).to_wkt()
        corners = _corners({"crs": wkt, "transform": transform, "window": window})
        records.append({"rank": rank, "tile": f"t{rank}", "scene": "s", "row": 64, "col": 32, "score": 0.5,
                        "entropy": 0.1, "disagreement": None, "crs": wkt, "corners": corners})  # fmt: skip
    layers = write_footprints(tmp_path / "tiles.gpkg", records)
    assert layers == ["tiles_1", "tiles_2_without_crs", "tiles_3"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.gpkg"]
    bounds = [(400_000, 5_799_936, 400_064, 5_800_000), (32, -96, 64, -64), (13, 51.99968, 13.00032, 52)]
    for layer, (crs, _), wanted in zip(layers, places, bounds, strict=True):
        meta, _, shapes, _ = pyogrio.raw.read(tmp_path / "tiles.gpkg", layer=layer)
        assert shapely.from_wkb(shapes[0]).bounds == pytest.approx(wanted, abs=1e-9)
        if crs is None:
            assert "EPSG" not in (meta["crs"] or "")
            assert "UTM" not in (meta["crs"] or "")
        else:
            assert rasterio.crs.CRS.from_user_input(meta["crs"]) == rasterio.crs.CRS.from_string(crs)
