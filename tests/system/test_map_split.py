"""One scene predicted by several processes: the bytes that one alone writes, or an error and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dctc.mapping.windows import Grid
from tests.system.oracle import labels, write_scene
from tests.system.test_map_folder import content, predict
from tests.tiny import ROOT, run

CHILD = """
import os, signal, sys
from pathlib import Path
from dctc.mapping.team import Ranks, Team
from dctc.mapping.scenes import predict_scenes, scenes_of
from shards.errors import InputError
from tests.system.oracle import Oracle
from tests.system.test_map_folder import ALL, CPU
scenes, out, fault = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ranks = Ranks.from_environment()
model = Oracle(64)
def fail():
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise InputError("out of order")
if fault != "none" and ranks.rank == 1:
    model.at[3] = fail
try:
    with Team(ranks, silence_s=3 if fault == "killed" else 60) as team:
        for maps in predict_scenes(model, "m", scenes_of([scenes], out), out, ALL, CPU, team=team):
            print(maps.scene.stem, flush=True)
except InputError as error:
    print(error.message, flush=True)
    sys.exit(2)
"""


def together(scenes: Path, out: Path, world: int, fault: str = "none") -> list[tuple[int, str]]:
    """Exit status and output of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(scenes), str(out), fault],
            cwd=ROOT, env={**os.environ, **place, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize("overlap", [0, 0.25, 0.9])
def test_parts_have_every_row_once_and_all_windows_that_reach_there(overlap: float) -> None:
    grid = Grid.over(500, 80, 64, overlap)
    count = len(grid.tops)
    for world in (2, 3, 50):
        rows = []
        for rank in range(world):
            own = range(rank * count // world, (rank + 1) * count // world)
            bands = list(grid.bands(own))
            rows += [row for band in bands if band.row in own for row in range(band.top, band.done)]
            missing = [top for top in grid.tops[: bands[0].row] if top + 64 > grid.tops[own.start]] if own else []
            assert not missing
        np.testing.assert_array_equal(rows, np.arange(500))


def test_parts_of_three_processes_are_the_bytes_of_one(tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    write_scene(scenes / "tall.tif", labels(130, 60).repeat(3, 1).repeat(3, 2), nodata=3)
    write_scene(scenes / "tiny.tif", labels(20, 30))  # one row of windows: two processes have none
    predict(scenes, tmp_path / "alone")
    assert together(scenes, tmp_path / "maps", 3) == [(0, "tall\ntiny\n"), (0, ""), (0, "")]
    assert content(tmp_path / "maps") == content(tmp_path / "alone")
    assert not [path for path in (tmp_path / "maps").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("error", 2, "process 1 of 2 stopped: out of order"),
        pytest.param("killed", -signal.SIGKILL, "process 1 of 2 gave no sign", marks=pytest.mark.matrix),
    ],
)
def test_one_that_fails_or_is_killed_stops_the_others(tmp_path: Path, fault: str, status: int, message: str) -> None:
    scenes, out = tmp_path / "scenes", tmp_path / "maps"
    scenes.mkdir()
    write_scene(scenes / "a.tif", labels(200, 100))
    (leader, said), (other, _) = together(scenes, out, 2, fault)
    assert leader == 2
    assert other == status
    assert message in said
    assert not content(out)
    predict(scenes, out)  # a killed one left hidden rows; they are gone now
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.matrix
def test_two_launched_processes_write_the_bytes_of_one(tmp_path: Path, tiny_model: Path) -> None:
    scene = write_scene(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 256, (3, 150, 90), np.uint8))
    command = ["dctc.cli", "predict", tiny_model, scene, "--entropy", "--polygons", "--out"]
    run("dctc", *command[1:], tmp_path / "alone")
    run(
        "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", *command,
        tmp_path / "maps", ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert content(tmp_path / "maps") == content(tmp_path / "alone")
    assert not [path for path in (tmp_path / "maps").iterdir() if path.name.startswith(".")]
