"""A run's model in MLflow: logged, registered, named by URI in other commands, and served on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

from dctc.cli import main
from tests.tiny import ROOT, SCRIPTS, run, write_config

CLASSES = 6
SERVE = ["models", "serve", "-m", "models:/towns/1", "--env-manager", "local", "-h", "127.0.0.1"]


@dataclass(frozen=True)
class Tracked:
    """A finished run: where MLflow is, its id there, its model file, and a scene with its map by ``dctc predict``."""

    uri: str
    run_id: str
    file: Path
    scene: Path
    classes: Path


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Tracked:
    folder = tmp_path_factory.mktemp("served")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    config = write_config(
        folder / "run.yaml", tiny_dataset, tracking={"enabled": True, "uri": uri, "register_as": "towns"}
    )
    run("dctc", "train", config, PYTHONPATH=str(ROOT))
    file = folder / "runs" / "synthetic-scene" / "run" / "model.safetensors"
    scene = min((tiny_dataset.parent / "scenes").glob("*_RGB.tif"))
    done = run("dctc", "predict", file, scene, "--out", folder / "maps", "--json", PYTHONPATH=str(ROOT))
    (version,) = MlflowClient(uri).search_model_versions("name='towns'")
    return Tracked(uri, str(version.run_id), file, scene, Path(json.loads(done.stdout)[0]["files"][0]))


@pytest.fixture
def dctc(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command in this process with that MLflow; gives its exit code and what it printed, errors included."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked.uri)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dctc", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            main()
        printed = capfd.readouterr()
        code = int(ending.value.code or 0)
        return code, printed.err if code else printed.out

    return call


Dctc = Callable[..., tuple[int, str]]


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as file:
        values: NDArray[Any] = file.read()
    return values


def test_the_run_holds_the_model_with_its_signature_and_no_pickle(
    tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.models import get_model_info

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked.uri)
    info = get_model_info(f"runs:/{tracked.run_id}/model")
    assert info.signature is not None
    assert info.signature.inputs.to_dict() == [
        {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": (-1, -1, -1, 3)}}
    ]
    assert info.signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "uint8", "shape": (-1, -1, -1)}
    folder = Path(MlflowClient(tracked.uri).download_artifacts(tracked.run_id, "model", str(tmp_path)))
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    assert (folder / "data" / "model.safetensors").read_bytes() == tracked.file.read_bytes()


def test_uris_take_the_place_of_the_model_file(
    dctc: Dctc, tracked: Tracked, tiny_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "maps"
    assert dctc("predict", "models:/towns/1", tracked.scene, "--out", out)[0] == 0
    np.testing.assert_array_equal(read(out / tracked.classes.name), read(tracked.classes))
    matrices = []
    for model in (tracked.file, f"runs:/{tracked.run_id}/model", f"runs:/{tracked.run_id}"):
        code, printed = dctc("evaluate", model, tiny_dataset, "--json", "--out", tmp_path)
        assert code == 0
        matrices.append([net["scores"]["matrix"] for net in json.loads(printed)["nets"].values()])
    assert matrices[0] == matrices[1] == matrices[2]


@pytest.mark.parametrize("model", ["models:/towns/9", "models:/nobody/1", "runs:/0123/model", "models:/"])
def test_a_uri_of_nothing_is_refused(dctc: Dctc, tracked: Tracked, tmp_path: Path, model: str) -> None:
    code, message = dctc("predict", model, tracked.scene, "--out", tmp_path / "maps")
    assert code == 2
    assert message.startswith(f"error: {model}: ")
    assert "MLFLOW_TRACKING_URI" in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "maps").exists()


def test_a_registered_model_is_sent_once(dctc: Dctc, tracked: Tracked) -> None:
    command = ("export", tracked.file, "--format", "mlflow", "--register", "others", "--json")
    found = [json.loads(dctc(*command, *more)[1]) for more in ((), (), ("--net", "teacher"))]
    assert found[0] == found[1] == {"registered": "models:/others/1", "net": "s1"}
    assert found[2] == {"registered": "models:/others/2", "net": "teacher"}
    version = MlflowClient(tracked.uri).get_model_version("others", "1")
    assert version.run_id == tracked.run_id


LOADING = """
import json, sys
import mlflow.pyfunc, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
import dctc
images = np.load(sys.argv[2])
found = model.predict(images, params=json.loads(sys.argv[4]))
np.save(sys.argv[3], found)
print(dctc.__file__)
"""


@pytest.mark.matrix
def test_a_folder_is_loaded_with_its_own_code_and_gives_the_map_of_predict(
    dctc: Dctc, tracked: Tracked, tmp_path: Path
) -> None:
    folder = tmp_path / "town"
    assert dctc("export", tracked.file, "--format", "mlflow", "--out", folder)[0] == 0
    images = read(tracked.scene).transpose(1, 2, 0)[None]  # 96 x 96 in windows of 32
    np.save(tmp_path / "images.npy", images)

    def predicted(array: NDArray[Any], **params: Any) -> NDArray[Any]:
        np.save(tmp_path / "images.npy", array)
        command = [sys.executable, "-c", LOADING, folder, tmp_path / "images.npy", tmp_path / "ids.npy"]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [*map(str, command), json.dumps(params)], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(folder / "code")
        found: NDArray[Any] = np.load(tmp_path / "ids.npy", allow_pickle=False)
        assert found.dtype == np.uint8
        return found

    np.testing.assert_array_equal(predicted(images), read(tracked.classes))
    odd = np.ascontiguousarray(images[:, :41, :7])
    odd[:, :5] = 0
    found = predicted(np.concatenate([odd, odd]), net="teacher", nodata=0.0)
    assert found.shape == (2, 41, 7)
    assert (found[:, :5] == 255).all()
    assert found[:, 5:].max() < CLASSES
    code, message = dctc("export", tracked.file, "--format", "mlflow", "--out", folder)
    assert code == 2
    assert "is there already" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "images.npy", "town"]


def ask(port: int, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.matrix
def test_mlflow_serves_the_registered_model(tracked: Tracked, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": tracked.uri, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [str(SCRIPTS / "mlflow"), *SERVE, "-p", str(port), "--workers", "1"], cwd=tmp_path, env=environment,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        images = read(tracked.scene).transpose(1, 2, 0)[None]
        answer = ask(port, {"inputs": images.tolist()})
        np.testing.assert_array_equal(np.array(answer["predictions"], np.uint8), read(tracked.classes))
        part = ask(port, {"inputs": images[:, :5, :9].tolist(), "params": {"nodata": int(images[0, 0, 0, 0])}})
        assert np.shape(part["predictions"]) == (1, 5, 9)
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, {"inputs": images[..., :2].tolist()})
        assert refused.value.code == 400
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
