"""`dctc evaluate` finds what the run's own test found; splits without labels are said to be so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from sklearn.metrics import confusion_matrix

from dctc.bundle import Bundle
from dctc.data.tiles import TileDataset
from shards.index import Index
from shards.manifest import Dataset
from tests.data.test_faults import small_disk
from tests.tiny import run, write_config


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """The folder of a run with loader workers, validation, pictures and the final test."""
    config = write_config(
        tmp_path_factory.mktemp("tested") / "tested.yaml",
        tiny_dataset,
        data={"workers": 1, "augment": "flips"},
        run={"pictures_every": 3},
        evaluation={"every": 3, "test": True},
    )
    run("dctc", "train", config)
    return config.parent / "runs" / "synthetic-scene" / "tested"


def test_evaluate_repeats_the_final_test(tested: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    done = run("dctc", "evaluate", tested / "model.safetensors", tiny_dataset, "--json", "--out", out, "--batch", 5)
    found, reported = json.loads(done.stdout), json.loads((tested / "report.json").read_text())["test"]
    assert found["nets"].keys() == {"s1", "s2", "mean", "teacher"}
    for name, net in found["nets"].items():
        assert net["scores"]["matrix"] == reported["nets"][name]["scores"]["matrix"]
        assert net["entropy"] == pytest.approx(reported["nets"][name]["entropy"], rel=1e-5)
        assert (out / f"test-{name}-confusion.png").stat().st_size > 1000
        header = (out / f"test-{name}.csv").read_text().splitlines()[0]
        assert header.startswith("class,iou")
    assert found["tiles"] == reported["tiles"]


def test_averaged_over_eight_views(tested: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    model, out = tested / "model.safetensors", tmp_path / "scores"
    scenes = tiny_dataset.parent / "scenes"
    words = ("--tta", "--scenes", "--root", scenes, "--json", "--out", out)
    found = json.loads(run("dctc", "evaluate", model, tiny_dataset, *words).stdout)
    assert found["tta"] is True
    bundle, dataset = Bundle.load(model), Dataset.open(tiny_dataset)
    matrices = {name: np.zeros((6, 6), np.int64) for name in found["nets"]}
    tiles = TileDataset(dataset, labels=True)
    for row in Index.open(dataset).rows("test"):
        tile = tiles[0, int(row)]
        image, truth = tile["images"][0].numpy(), tile["labels"][0].numpy()
        assert tile["valid"].all()
        views = [image, np.flip(image, 2)]
        seen = [
            bundle.logits(torch.from_numpy(np.rot90(view, k, (1, 2)).copy())[None]) for view in views for k in range(4)
        ]
        for name, matrix in matrices.items():
            turned = [torch.softmax(logits[name].double(), 1)[0].numpy() for logits in seen]
            back = [np.rot90(p, -(k % 4), (1, 2)) for k, p in enumerate(turned)]
            mean = (np.add.reduce(back[:4]) + np.flip(np.add.reduce(back[4:]), 2)) / 8
            kept = truth != 255
            matrix += confusion_matrix(truth[kept], mean.argmax(0)[kept], labels=range(6))
    for name, matrix in matrices.items():
        ours = np.array(found["nets"][name]["scores"]["matrix"])
        assert abs(ours - matrix).sum() <= 4, "but for a tie or two of float32"
    plain = json.loads((tested / "report.json").read_text())["test"]["nets"]["s1"]["scores"]["matrix"]
    assert found["nets"]["s1"]["scores"]["matrix"] != plain
    (scene,) = sorted(scenes.rglob(f"top_potsdam_{next(iter(found['scenes']['scenes']))}_RGB.tif"))
    run("dctc", "predict", model, scene, "--tta", "--out", tmp_path / "maps")
    file = f"{scene.stem}_classes.tif"
    with rasterio.open(tmp_path / "maps" / file) as one, rasterio.open(out / "maps" / file) as other:
        assert (one.read() == other.read()).all()
    run("dctc", "evaluate", model, tiny_dataset, "--tta")
    assert (tested / "evaluation-test-tta" / "test-s1.csv").exists()


def test_a_full_disk_is_one_message_and_leaves_no_half_file(tested: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 16):
        out = tmp_path / "disk" / "scores"
        done = run("dctc", "evaluate", tested / "model.safetensors", tiny_dataset, "--out", out, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert re.search(
            rf"^error: {re.escape(str(out))}/test-\S+: no space is left there: make room", done.stderr, re.MULTILINE
        )
        assert (out / "test-s1.csv").exists(), "the first fits"
        assert not list(out.glob("*.tmp"))


def test_a_place_that_is_no_folder_is_told_before_the_work(tested: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("dctc", "evaluate", tested / "model.safetensors", tiny_dataset, "--out", tmp_path / "file", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: {tmp_path / 'file'}: this folder cannot be made (File exists); name another by --out"
    )
    assert len(done.stderr.splitlines()) == 1


def test_another_dataset_than_the_models_is_told(tested: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    """Packed anew with other splits its test scenes are ones that the model has learnt."""
    model = tested / "model.safetensors"
    scenes, other = tiny_dataset.parent / "scenes", tmp_path / "other"
    assert "not the dataset" not in run("dctc", "evaluate", model, tiny_dataset, "--out", tmp_path / "own").stdout
    recipe = Path(__file__).resolve().parents[2] / "configs" / "data" / "synthetic.yaml"
    run("dctc", "shard", recipe, other, "--root", scenes, "tile.size=32", "splits.seed=3")
    told = " ".join(run("dctc", "evaluate", model, other, "--out", tmp_path / "scores").stdout.split())
    assert "not the dataset that the model was trained on" in told
    record = json.loads(run("dctc", "evaluate", model, other, "--out", tmp_path / "scores", "--json").stdout)
    assert record["dataset"] == Dataset.open(other).digest
    assert record["trained_on"] == Dataset.open(tiny_dataset).digest


def test_the_run_leaves_what_it_promises(tested: Path) -> None:
    tables = ["test-classes.csv", "test-classes-ece.csv", "test-s1-calibration.csv", "test-teacher-calibration.png"]
    tables.append("test-mean-calibration-sharpened.csv")
    for name in ("config.yaml", "metrics.jsonl", "model.safetensors", "best.safetensors", "report.json", *tables):
        assert (tested / name).stat().st_size > 0
    assert sorted(path.name for path in (tested / "pictures").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    names = {key for line in (tested / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)["values"]}
    losses = {"teacher", "teacher_to_s1", "teacher_to_s2", "s2_to_s1", "s1_to_s2"}
    promised = {f"train/loss/{name}" for name in losses}
    promised |= {"train/lr", "train/agreement", "train/entropy/teacher", "train/entropy/s1", "train/entropy/s2"}
    promised |= {"best/val_miou", "perf/tiles_per_s", "perf/rounds_per_s", "perf/peak_memory_gib"}
    promised |= {f"{split}/{net}/{score}" for split in ("val", "test") for net in ("s1", "s2", "mean", "teacher")
                 for score in ("miou", "pa", "mpa", "f1")}  # fmt: skip
    promised |= {"test/s1/iou/building", "perf/data_wait_share", "perf/train_seconds", "perf/round_gflop"}
    promised |= {"test/s1/ece", "test/s2/sharpened_ece", "test/teacher/f1_without_clutter", "val/mean/ece"}
    promised |= {f"train/pseudo/{net}/{score}" for net in ("s1", "s2", "mean", "teacher")
                 for score in ("miou", "miou_without_clutter", "pa", "ece", "sharpened_ece")}  # fmt: skip
    promised |= {f"train/pseudo/s2/{kind}/building" for kind in ("iou", "precision", "recall")}
    promised |= {"train/dying/s1", "train/dying/teacher"}
    assert promised - names == set()
    report = json.loads((tested / "report.json").read_text())
    assert report["round_gflop"] > 0
    assert report["peak_memory_gib"] >= report["test"]["peak_memory_gib"] > 0
    scores = report["test"]["nets"]["s1"]
    assert scores["scores"]["miou_without_clutter"] > 0
    assert 0 <= scores["ece"] <= 1
    assert scores["ece_by_class"].keys() <= scores["scores"]["classes"].keys()


def test_running_it_again_does_nothing(tested: Path) -> None:
    def written() -> dict[Path, int]:
        files = (
            path for path in tested.rglob("*") if path.is_file() and path.name != ".lock"
        )  # says who was here last
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    done = run("dctc", "train", tested.parents[2] / "tested.yaml")
    assert "finished, nothing to do" in done.stdout
    assert written() == before
