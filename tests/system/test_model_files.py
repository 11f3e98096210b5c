"""Model files that are damaged or not for this: `dctc predict` and `evaluate` refuse them in one line, exit 2."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dctc.bundle import DIGEST_KEY, METADATA_KEY, SCHEMA_VERSION, digest
from dctc.cli import main

Command = Callable[[Path], str]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A private copy of a trained model's file."""
    return Path(shutil.copy(tiny_model, tmp_path / "model.safetensors"))


@pytest.fixture
def scene(tiny_dataset: Path) -> Path:
    return next((tiny_dataset.parent / "scenes").glob("*_RGB.tif"))


@pytest.fixture(params=["predict", "evaluate"])
def refused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    tiny_dataset: Path, scene: Path, tmp_path: Path,
) -> Command:  # fmt: skip
    """Run the command on a model; gives its one line. Nothing of its output may be there afterwards."""
    out = tmp_path / "out"

    def call(model: Path) -> str:
        inputs = [str(scene)] if request.param == "predict" else [str(tiny_dataset)]
        monkeypatch.setattr(sys, "argv", ["dctc", request.param, str(model), *inputs, "--out", str(out)])
        with pytest.raises(SystemExit) as ending:
            main()
        message = capfd.readouterr().err
        assert ending.value.code == 2, message
        assert message.startswith("error: ")
        assert len(message.strip().splitlines()) == 1
        assert str(model) in message
        assert not out.exists() or not list(out.iterdir())
        return message

    return call


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """The file again, with a digest that fits, after ``change(tensors, description record)``."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        record = json.loads(file.metadata()[METADATA_KEY])
    change(tensors, record)
    text = json.dumps(record)
    save_file(tensors, path, {METADATA_KEY: text, DIGEST_KEY: digest(text, tensors)})
    return path


def test_a_pickle_is_not_opened(refused: Command, model: Path) -> None:
    marker = model.with_name("was run")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    for write in (pickle.dump, torch.save):
        with model.open("wb") as file:
            write(Trap(), file)
        assert "pickle" in refused(model)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 7, 200, 0.5, 0.999])
def test_a_truncated_file(refused: Command, model: Path, kept: float) -> None:
    data = model.read_bytes()
    model.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert "copy it again" in refused(model)


def test_changed_bytes(refused: Command, model: Path) -> None:
    data = bytearray(model.read_bytes())
    data[-100] ^= 0x40
    model.write_bytes(data)
    assert "SHA-256" in refused(model)


def test_a_newer_schema(refused: Command, model: Path) -> None:
    message = refused(rewrite(model, lambda _, record: record.update(schema_version=SCHEMA_VERSION + 1)))
    assert f"schema {SCHEMA_VERSION + 1}" in message
    assert "update dctc" in message


def test_weights_of_another_type(refused: Command, model: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        tensors.update({key: value.half() for key, value in tensors.items()})

    assert "float16" in refused(rewrite(model, halve))


def test_bands_that_do_not_fit_the_network(refused: Command, model: Path) -> None:
    def add(_: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        record["bands"].append("nir")

    assert "3 bands" in refused(rewrite(model, add))


def test_a_model_of_another_pixel_type_fits_neither_scene_nor_dataset(
    model: Path, scene: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rewrite(model, lambda _, record: record.update(dtype="uint16"))
    out = model.with_name("out")
    for command, given in (("predict", scene), ("evaluate", tiny_dataset)):
        monkeypatch.setattr(sys, "argv", ["dctc", command, str(model), str(given), "--out", str(out)])
        with pytest.raises(SystemExit) as ending:
            main()
        message = capfd.readouterr().err
        assert (ending.value.code, len(message.splitlines())) == (2, 1)
        assert str(given) in message
        assert "uint16" in message
        assert "uint8" in message


def test_a_file_of_schema_1_still_predicts(model: Path, tiny_model: Path, scene: Path, tmp_path: Path) -> None:
    with safe_open(model, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        record = json.loads(file.metadata()[METADATA_KEY]) | {"schema_version": 1}
    save_file(tensors, model, {METADATA_KEY: json.dumps(record)})
    maps = []
    for number, source in enumerate((model, tiny_model)):
        from dctc.bundle import Bundle
        from dctc.mapping.predict import predict_scene

        with rasterio.open(predict_scene(Bundle.load(source), scene, tmp_path / str(number)).classes) as file:
            maps.append(file.read())
    np.testing.assert_array_equal(*maps)
