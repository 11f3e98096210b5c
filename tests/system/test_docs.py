"""The commands of the pages about a trained model, run as they stand there and in their order on a tiny one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.system import test_serving
from tests.system.test_readme import commands
from tests.tiny import ROOT, SCRIPTS

RUN = "runs/synthetic-scene/dctc-1_8-s0"
SERVE = "mlflow models serve -m models:/towns/1 --env-manager local -h 127.0.0.1 -p 5001"
SCENE = "top_potsdam_2_6_RGB"  # what the pages call a scene
MADE = {
    "models": [
        f"{RUN}/model.onnx", "exported/mean.pt2", "exported/towns/MLmodel", "evaluation-test",
        "maps/SCENE_classes.tif",
    ],
    "maps": [f"maps/SCENE_{name}" for name in (
        "classes.tif", "classes.qml", "probabilities.tif", "entropy.tif", "disagreement.tif", "polygons.gpkg",
        "polygons.qml", "maps.json",
    )],
    "evaluation": [f"{RUN}/evaluation-test/test-scenes.csv", f"{RUN}/evaluation-test/maps"],
    "labelling": [f"tiles{name}" for name in (".gpkg", ".txt", "_train.txt", "_val.txt", "_test.txt")],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.matrix) for page in MADE])
def test_the_commands_do_what_the_page_says(page: str, tiny_model: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    lines = commands((ROOT / "docs" / f"{page}.md").read_text())
    assert lines
    if page == "models":
        assert lines.pop() == SERVE  # test_serving starts it, on a free port
        assert SERVE.split()[1:-2] == test_serving.SERVE
    (tmp_path / RUN).mkdir(parents=True)
    shutil.copy(tiny_model, tmp_path / RUN)
    for name, source in (("datasets", tiny_dataset), ("scenes", tiny_dataset.parent / "scenes")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "synthetic").symlink_to(source)
    scene = min((tmp_path / "scenes" / "synthetic").glob("*_RGB.tif"))
    MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for line in lines:
        command = line.replace(SCENE, scene.stem)
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    made = [name.replace("SCENE", scene.stem) for name in MADE[page]]
    assert [name for name in made if not (tmp_path / name).exists()] == []
