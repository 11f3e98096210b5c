"""`dctc predict` as it is typed: its options, what is finished, and what a signal leaves."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pyogrio
import rasterio

from tests.system.oracle import write_scene
from tests.system.test_map_folder import content
from tests.tiny import interrupt, run


def towns(folder: Path, *sizes: int) -> Path:
    folder.mkdir()
    for number, size in enumerate(sizes):
        values = np.random.default_rng(number).integers(0, 256, (3, size, size), np.uint8)
        write_scene(folder / f"town{number}.tif", values)
    return folder


def test_a_folder_with_every_kind_of_map_then_nothing_then_afresh(tmp_path: Path, tiny_model: Path) -> None:
    scenes, out = towns(tmp_path / "scenes", 70, 50), tmp_path / "maps"
    options = ["--disagreement", "--polygons", "--polygon-min-area", "30", "--json"]

    def speeds(*more: str) -> list[float | None]:
        found = json.loads(run("dctc", "predict", tiny_model, scenes, "--out", out, *options, *more).stdout)
        assert [Path(maps["scene"]).name for maps in found] == ["town0.tif", "town1.tif"]
        assert all(Path(file).exists() for maps in found for file in maps["files"])
        return [maps["mpx_per_s"] for maps in found]

    assert None not in speeds()
    first = content(out)
    assert {name.partition("_")[2] for name in first} >= {
        "classes.tif", "classes.qml", "disagreement.tif", "polygons.gpkg", "polygons.qml", "maps.json",
    }  # fmt: skip
    with rasterio.open(out / "town0_disagreement.tif") as file:
        assert (file.read(1) <= 250).all()
    areas = pyogrio.raw.read(out / "town0_polygons.gpkg")[3][2]
    assert len(areas)
    assert areas.min() >= 30
    assert speeds() == [None, None]
    assert None not in speeds("--fresh")
    assert content(out) == first


def test_sigterm_ends_like_ctrl_c_and_leaves_no_part(tmp_path: Path, tiny_model: Path) -> None:
    scenes, out = towns(tmp_path / "scenes", 40, 1500), tmp_path / "maps"
    command = ["dctc", "predict", tiny_model, scenes, "--out", out]
    assert interrupt(command, signal.SIGTERM, out / "town0_maps.json") == 75
    left = {path.name for path in out.iterdir()}
    assert {"town0_classes.tif", "town0_maps.json"} <= left
    assert not [name for name in left if name.startswith((".", "town1"))]
