"""`benchmarks/tables.py` as it is typed, on runs that are as small as can be."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio

from benchmarks.halved import halve
from benchmarks.kept import keep, restore
from benchmarks.tables import DUBAI, STUDIES, Place, rotation
from tests.tiny import ROOT, run

SMALL = ["network.width=4", "schedule.rounds=1", "data.batch_labelled=2", "data.batch_unlabelled=2"]


def tables(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", *map(str, words)],
        capture_output=True, text=True, check=False, timeout=120, cwd="/",
    )  # fmt: skip


def test_without_runs_or_scenes_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = tables("synthetic", "--work", tmp_path, "--compare", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"{tmp_path / 'runs' / 'synthetic-scene'}: no finished run of table1, table3" in done.stderr
    done = tables("synthetic", "--work", tmp_path, "--compare", "--rounds", 50, "--out", tmp_path / "out")
    assert f"{tmp_path / 'runs' / 'synthetic-scene-50'}: no finished run of table1, table3" in done.stderr
    done = tables("dubai", "--work", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "SKIPPED" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_option_is_no_silent_one(tmp_path: Path) -> None:
    done = tables("synthetic", "--work", tmp_path, "--compare", "--seeds", 3)
    assert done.returncode == 2
    assert "--seeds 3: with --compare there is no sweep to take this" in done.stderr
    done = tables("synthetic", "--work", tmp_path, "--rounds", 0)
    assert done.returncode == 2
    assert "argument --rounds: invalid positive value: '0'" in done.stderr
    done = tables("synthetic", "--work", tmp_path, "--sweeps", "table9")
    assert done.returncode == 2
    assert "study paper has no sweep table9: table1, table3" in done.stderr


def test_another_length_is_filed_apart(tmp_path: Path) -> None:
    usual = Place("synthetic", None, STUDIES["labels"], tmp_path)
    longer = Place("synthetic", None, STUDIES["labels"], tmp_path, 50)
    others = [text for text in usual.settings if not text.startswith("schedule.rounds=")]
    assert (usual.settings, longer.settings) == (list(STUDIES["labels"].settings), [*others, "schedule.rounds=50"])
    assert (usual.results, longer.results) == ("labels_synthetic", "labels_synthetic_50")
    assert (usual.folder.name, longer.folder.name) == ("synthetic-scene", "synthetic-scene-50")
    assert usual.dataset == longer.dataset


def test_weight_decay_is_filed_apart_and_all_else_is_the_same(tmp_path: Path) -> None:
    plain, decay = (Place("synthetic", None, STUDIES[name], tmp_path, 50) for name in ("labels", "decay"))
    assert [text for text in plain.settings if text not in decay.settings] == [
        "optimizer.name=adam", "optimizer.weight_decay=0"
    ]  # fmt: skip
    assert [text for text in decay.settings if text not in plain.settings] == [
        "optimizer.name=adamw", "optimizer.weight_decay=0.5"
    ]  # fmt: skip
    assert (decay.results, decay.folder.name) == ("decay_synthetic_50", "synthetic-decay-50")
    assert (decay.dataset, decay.study.tables) == (plain.dataset, plain.study.tables)


def test_each_test_tile_in_turn(tmp_path: Path) -> None:
    places = [Place("dubai", test, STUDIES["labels"], tmp_path, 50) for test in DUBAI]
    assert [place.results for place in places] == [f"labels_dubai{x}_50" for x in ("-1", "-2", "-5", "-6", "")]
    for place in places:
        held_out = [text for text in place.split if f"t{place.test}" in text]
        assert len(held_out) == (0 if place.test == 8 else 1), "train and validation are the other tiles"
        report = place.folder / "extended-u-net-1_8-s0" / "report.json"
        report.parent.mkdir(parents=True)
        report.write_text("{}")
        rows = [f"U-Net,s1,1/8,0.{place.test}14,3", *(["CPS,mean,1/8,0.5,1"] if place.test == 8 else [])]
        cells = tmp_path / f"{place.results}_extended_1.csv"
        cells.write_text("\n".join(("row,net,column,mean,seeds", *rows)))
    text = "\n".join(rotation(places, "labels", tmp_path))
    assert "| row | net | share | tile 1 | tile 2 | tile 5 | tile 6 | tile 8 | mean |" in text
    scores = "11.4 (3) | 21.4 (3) | 51.4 (3) | 61.4 (3) | 81.4 (3)"
    assert f"| U-Net | s1 | 1/8 | {scores} | 45.4 |" in text, "44 + 1.4"
    assert "| CPS | mean | 1/8 | – | – | – | – | 50.0 | – |" in text, "a mean of all tiles or none"
    assert "tables.py dubai --study labels --work DIR --test all --data FOLDER --rounds 50 --compare" in text


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scenes_at_half_of_their_resolution(tmp_path: Path) -> None:
    """Means of images, single pixels of masks (no colour between two classes), palettes, and odd sizes."""
    image = np.tile(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8), (3, 1, 1))  # JPEG halves colour
    mask = np.kron(np.array([[3, 1], [0, 2]], np.uint8), np.ones((4, 4), np.uint8))[:, :7]  # a column less
    colours = {0: (9, 9, 9, 255), 1: (50, 60, 70, 255), 2: (1, 2, 3, 255), 3: (200, 0, 0, 255)}
    folder = tmp_path / "scenes" / "Tile 1"
    folder.mkdir(parents=True)
    with rasterio.open(
        folder / "a.jpg", "w", driver="JPEG", quality=100, width=8, height=8, count=3, dtype="uint8"
    ) as to:
        to.write(image)
    with rasterio.open(folder / "a.png", "w", driver="PNG", width=7, height=8, count=1, dtype="uint8") as to:
        to.write(mask, 1)
        to.write_colormap(1, colours)
    halve(tmp_path / "scenes", tmp_path / "half")
    with rasterio.open(folder / "a.jpg") as whole, rasterio.open(tmp_path / "half" / "Tile 1" / "a.jpg") as done:
        means = whole.read().reshape(3, 4, 2, 4, 2).mean(axis=(2, 4))
        assert np.abs(done.read() - means).mean() < 0.1 * whole.read().std(), "but for what JPEG leaves of it"
    with rasterio.open(tmp_path / "half" / "Tile 1" / "a.png") as done:
        assert (done.width, done.height) == (3, 4)
        assert set(np.unique(done.read(1)).tolist()) == {0, 1, 2, 3}
        assert done.colormap(1)[3] == colours[3]
    (tmp_path / "half" / "Tile 1" / "a.jpg").unlink()
    halve(tmp_path / "scenes", tmp_path / "half")
    assert not (tmp_path / "half" / "Tile 1" / "a.jpg").exists(), "what is there is left as it is"
    assert not list(tmp_path.glob(".*")), "no draft stays"


def test_a_folder_without_scenes_is_named(tmp_path: Path) -> None:
    done = tables("dubai", "--study", "labels", "--data", tmp_path / "gone", "--work", tmp_path / "work")
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path / 'gone'}: no folder with .jpg or .png files; give that of the scenes\n"


def test_sigterm_is_for_the_command_that_runs(tmp_path: Path) -> None:
    words = [sys.executable, "-u", str(ROOT / "benchmarks" / "tables.py"), "synthetic", "--work", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("$ dctc synth ")
        while not any(tmp_path.rglob("*.tif")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    deadline = time.monotonic() + 20
    while _is_group(process.pid):
        assert time.monotonic() < deadline, "what it started ends too, its workers a little later"
        time.sleep(0.1)


def _is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_kept_of_runs(tmp_path: Path) -> None:
    work, archive = tmp_path / "work", tmp_path / "runs.tar.xz"
    for name, file in (("done", "report.json"), ("done", "model.safetensors"), ("begun", "config.yaml")):
        (work / "runs" / "towns" / name).mkdir(parents=True, exist_ok=True)
        (work / "runs" / "towns" / name / file).write_text(file)
    with sqlite3.connect(work / "mlflow.db") as store:
        store.execute("CREATE TABLE metrics (key TEXT, step INTEGER)")
        store.executemany("INSERT INTO metrics VALUES ('loss', ?)", [(step,) for step in range(0, 301, 10)])
    assert keep(work, archive) == 1
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == ["mlflow.db", "runs/towns/done/report.json"], "neither weights nor half a run"
    assert restore(archive, tmp_path / "new")
    with sqlite3.connect(tmp_path / "new" / "mlflow.db") as store:
        assert [step for (step,) in store.execute("SELECT step FROM metrics")] == [0, 100, 200, 300]
    with sqlite3.connect(work / "mlflow.db") as store:
        assert store.execute("SELECT count(*) FROM metrics").fetchone() == (31,), "the runs' own stays whole"
    assert not restore(archive, work), "runs are there"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow.db").touch()
    with pytest.raises(ValueError, match=r"lacks runs/towns/done/report\.json: choose another --work"):
        restore(archive, other)
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut\.tar\.xz: a damaged archive"):
        restore(cut, tmp_path / "fourth")
    assert not (tmp_path / "fourth" / "mlflow.db").exists()
    assert not restore(tmp_path / "none.tar.xz", tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.matrix
@pytest.mark.slow
def test_tables_of_what_has_been_run(tmp_path: Path, tiny_dataset: Path) -> None:
    sweep = tmp_path / "table1.yaml"
    sweep.write_text(
        "name: table1\nseeds: [0]\nrows: [{row: U-Net, config: %s, shares: [1/2]}]\n"
        % (ROOT / "configs" / "synthetic" / "unet.yaml")
    )
    run("dctc", "sweep", sweep, f"data.dataset={tiny_dataset}", f"run.output={tmp_path / 'runs'}", *SMALL)
    archive = tmp_path / "runs.tar.xz"
    assert keep(tmp_path, archive) == 1
    elsewhere = tmp_path / "elsewhere"
    done = tables("synthetic", "--work", elsewhere, "--keep", archive, "--compare", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    on = run("dctc", "sweep", sweep, f"data.dataset={tiny_dataset}", f"run.output={elsewhere / 'runs'}", *SMALL)
    assert "(was finished)" in on.stdout, "a sweep goes on from the archive"
    text = (tmp_path / "out" / "tables_synthetic.md").read_text()
    assert "1 runs, " in text
    assert "dctc compare synthetic-scene --sweep table1 --table 1" in text
    assert "| U-Net | " in text
    assert "| car | " in text, "the classes"
    assert "`table3`: no finished run" in text
    assert (tmp_path / "out" / "tables_synthetic_1.csv").read_text().count("U-Net") == 1
