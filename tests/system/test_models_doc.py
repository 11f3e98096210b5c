"""The commands of docs/models.md, run in their order on a tiny model."""

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


@pytest.mark.matrix
@pytest.mark.slow
def test_the_commands_do_what_the_page_says(tiny_model: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    lines = commands((ROOT / "docs" / "models.md").read_text())
    assert lines.pop() == SERVE  # test_serving starts it, on a free port
    assert SERVE.split()[1:-2] == test_serving.SERVE
    (tmp_path / RUN).mkdir(parents=True)
    shutil.copy(tiny_model, tmp_path / RUN)
    for name, source in (("datasets", tiny_dataset), ("scenes", tiny_dataset.parent / "scenes")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "synthetic").symlink_to(source)
    scene = min((tmp_path / "scenes" / "synthetic").glob("*_RGB.tif"))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(uri).search_experiments()
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for line in lines:
        command = line.replace("top_potsdam_2_6_RGB.tif", scene.name)
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    made = [f"{RUN}/model.onnx", "exported/mean.pt2", "exported/towns/MLmodel", "evaluation-test"]
    made.append(f"maps/{scene.stem}_classes.tif")
    assert [name for name in made if not (tmp_path / name).exists()] == []
