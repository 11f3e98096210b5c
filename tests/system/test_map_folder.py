"""A folder of scenes: gone on with, killed, and the same bytes in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dctc.mapping.polygons import PolygonOptions
from dctc.mapping.scenes import Predicted, PredictOptions, predict_scenes, scenes_of
from dctc.mapping.team import Ranks
from shards.errors import InputError
from tests.system.oracle import Oracle, labels, write_scene
from tests.tiny import ROOT

ALL = PredictOptions(probabilities=True, entropy=True, disagreement=True, polygons=PolygonOptions(4, 1))
CPU = torch.device("cpu")


def make_scenes(folder: Path, count: int = 3, size: int = 150) -> Path:
    folder.mkdir()
    for number in range(count):
        write_scene(folder / f"scene{number}.tif", labels(size, size, number).repeat(3, 1).repeat(3, 2))
    return folder


def predict(
    scenes: Path, out: Path, digest: str = "m", options: PredictOptions = ALL, **more: object
) -> list[Predicted]:
    found = scenes_of([scenes], out)
    return list(predict_scenes(Oracle(64), digest, found, out, options, CPU, **more))  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def test_finished_maps_stay_until_model_options_scene_or_files_change(tmp_path: Path) -> None:
    scenes, out = make_scenes(tmp_path / "scenes", 2, 40), tmp_path / "maps"

    def made(**more: object) -> list[str]:
        return [maps.scene.stem for maps in predict(scenes, out, **more) if maps.pixels_per_s is not None]  # type: ignore[arg-type]

    assert made() == ["scene0", "scene1"]
    before = content(out)
    assert made() == []
    assert made(resume=False) == ["scene0", "scene1"]
    assert content(out) == before
    assert made(digest="other") == ["scene0", "scene1"]
    assert made(digest="other", options=PredictOptions(overlap=0.5)) == ["scene0", "scene1"]
    predict(scenes, out)
    (out / "scene1_entropy.tif").unlink()
    assert made() == ["scene1"]
    write_scene(scenes / "scene0.tif", labels(41, 40))
    assert made() == ["scene0"]
    (out / "scene1_maps.json").write_text("{")
    assert made() == ["scene1"]


def test_each_rank_makes_its_own_scenes(tmp_path: Path) -> None:
    scenes, out = make_scenes(tmp_path / "scenes", 3, 40), tmp_path / "maps"
    shares = [[m.scene.stem for m in predict(scenes, out, ranks=Ranks(rank, 2))] for rank in (0, 1)]
    assert shares == [["scene0", "scene2"], ["scene1"]]
    predict(scenes, tmp_path / "alone")
    assert content(out) == content(tmp_path / "alone")


def test_two_scenes_of_one_name_an_empty_folder_and_maps_among_scenes_are_refused(tmp_path: Path) -> None:
    scenes = make_scenes(tmp_path / "scenes", 1, 20)
    with pytest.raises(InputError, match="same file name"):
        scenes_of([scenes, tmp_path / "scene0.png"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no raster"):
        scenes_of([tmp_path / "empty"], tmp_path)
    with pytest.raises(InputError, match="choose another --out"):
        scenes_of([scenes], scenes)


def test_a_scene_that_does_not_fit_is_named_before_any_is_predicted(tmp_path: Path) -> None:
    scenes = make_scenes(tmp_path / "scenes", 1, 20)
    write_scene(scenes / "z.tif", labels(20, 20).astype("uint16"))
    with pytest.raises(InputError, match=r"z.tif: band 1 is uint16"):
        predict(scenes, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


CHILD = """
import sys, time
from pathlib import Path
from tests.system.test_map_folder import predict
Path(sys.argv[3]).touch()
predict(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def child(scenes: Path, out: Path, ready: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(scenes), str(out), str(ready)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.005)
    return process


def kill_and_go_on(tmp_path: Path, kills: int) -> None:
    scenes = make_scenes(tmp_path / "scenes")
    began = time.monotonic()
    predict(scenes, tmp_path / "whole")
    seconds = time.monotonic() - began
    whole = content(tmp_path / "whole")
    moments = random.Random(0)
    killed, tries = 0, 0
    while killed < kills:
        tries += 1
        assert tries <= 5 * kills, "it was done before it could be killed"
        out = tmp_path / f"maps{tries}"
        process = child(scenes, out, tmp_path / f"ready{tries}")
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:
            seconds *= 0.7  # the child is quicker than the run that was timed
        left = content(out) if out.exists() else {}
        records = {name for name in left if name.endswith("_maps.json")}
        for name, data in left.items():
            assert data == whole[name], f"{name} has its final name and is not whole"
        predict(scenes, out)
        assert records <= content(out).keys()
        assert content(out) == whole
        assert sorted(p.name for p in out.iterdir()) == sorted(whole)  # and no draft is left


@pytest.mark.matrix
@pytest.mark.slow
def test_killed_and_run_again_is_the_same_bytes(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, 2)


@pytest.mark.matrix
def test_killed_at_ten_moments_and_run_again_is_the_same_bytes(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, 10)
