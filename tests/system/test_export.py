"""`dctc export`: programs that other runtimes load, compared here with the eager model through their own runtimes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.bundle import Bundle, Description, save_bundle
from dctc.cli import main
from dctc.exporting import programs
from dctc.methods import build_method
from dctc.networks import NetworkSpec
from shards.manifest import ClassInfo
from tests.data.test_faults import small_disk

NETWORKS = ("unet", "attention_unet", "u2net_small", "u2net")
SIZES = ((1, 1, 1), (2, 16, 48), (3, 31, 70), (1, 100, 5), (1, 129, 64))
DESCRIPTION = Description(
    method="dctc",
    options={"attention": True},
    network=NetworkSpec(bands=4, classes=3, width=4),
    bands=["red", "green", "blue", "nir"],
    dtype="uint16",
    mean=[300.0, 400.5, 500.0, 2500.0],
    std=[80.0, 0.0, 120.0, 700.0],  # the second band never varies
    classes=[ClassInfo(name=f"class {k}", color=(k, 2 * k, 255 - k)) for k in range(3)],
    tile_size=64,
    dataset="0" * 64,
)


def model_of(folder: Path, network: str = "unet", norm: str = "batch") -> Path:
    """A model file with random weights and batch norms that have moved."""
    description = replace(DESCRIPTION, network=replace(DESCRIPTION.network, name=network, norm=norm))
    torch.manual_seed(0)
    method = build_method(description.method, description.network, description.options)
    for module in method.parts.values():
        for name, buffer in module.named_buffers():
            if not name.endswith("num_batches_tracked"):
                buffer.uniform_(0.5, 1.5)
    path = folder / "model.safetensors"
    save_bundle(path, description, {name: module.state_dict() for name, module in method.parts.items()})
    return path


@pytest.fixture
def dctc(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process; gives its exit code and what it printed, errors included."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dctc", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            main()
        printed = capfd.readouterr()
        code = int(ending.value.code or 0)
        return code, printed.err if code else printed.out

    return call


def pixels(size: tuple[int, int, int]) -> NDArray[np.float32]:
    """Whole numbers as a uint16 scene has them, and a corner without data."""
    batch, height, width = size
    values = np.random.default_rng(height).integers(0, 4000, (batch, 4, height, width)).astype(np.float32)
    values[:, :, : height // 5, : width // 5] = np.nan
    return values


def expected(model: Path, net: str, raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of the eager model, without data the bands' means: as `dctc predict` computes them."""
    bundle = Bundle.load(model)
    tensor = torch.from_numpy(raw)
    known = torch.where(tensor.isfinite().all(1, keepdim=True), tensor, torch.tensor(bundle.mean)[:, None, None])
    found: NDArray[np.float32] = bundle.logits(known)[net].softmax(1).numpy()
    return found


def check_onnx(model: Path, file: Path, net: str) -> None:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in SIZES:
        raw = pixels(size)
        (found,) = session.run(None, {"pixels": raw})
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected(model, net, raw), atol=1e-4, rtol=0)


def check_torch(model: Path, file: Path, net: str) -> None:
    program: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    for size in SIZES:
        raw = pixels(size)
        found = program(torch.from_numpy(raw)).numpy()
        np.testing.assert_allclose(found, expected(model, net, raw), atol=1e-4, rtol=0)


@pytest.mark.matrix
def test_onnx_gives_the_models_probabilities_at_any_size(dctc: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    model = model_of(tmp_path)
    code, printed = dctc("export", model, "--format", "onnx", "--net", "teacher", "--json")
    record = json.loads(printed)
    assert code == 0
    assert Path(record["file"]) == tmp_path / "model-teacher.onnx"
    assert record["largest_difference"] <= 1e-4
    check_onnx(model, tmp_path / "model-teacher.onnx", "teacher")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-teacher.onnx", "model.safetensors"]


def test_an_onnx_file_describes_itself_and_holds_one_net_alone(
    dctc: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    model = model_of(tmp_path, "attention_unet")
    file = tmp_path / "made" / "net.onnx"
    assert dctc("export", model, "--format", "onnx", "--out", file)[0] == 0
    check_onnx(model, file, "s1")
    proto = onnx.load(file)
    about: dict[str, Any] = {entry.key: entry.value for entry in proto.metadata_props}
    assert about["net"] == "s1"
    assert json.loads(about["bands"]) == DESCRIPTION.bands
    assert json.loads(about["class_names"]) == ["class 0", "class 1", "class 2"]
    assert json.loads(about["class_colors"])[2] == [2, 4, 253]
    assert about["pixel_type"] == "uint16"
    for value, channels in ((proto.graph.input[0], 4), (proto.graph.output[0], 3)):
        dims = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == ["batch", channels, "height", "width"]
    parts = Bundle.load(model).method.parts
    weights = sum(p.numel() for name in ("encoder", "s1") for p in parts[name].parameters())
    stored = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    assert stored < 1.1 * weights + 1000


@pytest.mark.matrix
def test_torch_export_gives_the_models_probabilities_at_any_size(
    dctc: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    model = model_of(tmp_path, norm="group")
    assert dctc("export", model, "--format", "torch", "--net", "mean")[0] == 0
    check_torch(model, tmp_path / "model-mean.pt2", "mean")
    extra = {programs.TORCH_METADATA: ""}
    program = torch.export.load(tmp_path / "model-mean.pt2", extra_files=extra)
    assert json.loads(extra[programs.TORCH_METADATA])["net"] == "mean"
    assert not any(name.startswith("parts.teacher") for name in program.state_dict)


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("net", "kind"), [("s2", "onnx"), ("teacher", "torch")])  # the two tests above: the others
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_is_exported(
    dctc: Callable[..., tuple[int, str]], tmp_path: Path, network: str, net: str, kind: str
) -> None:
    model = model_of(tmp_path, network)
    file = tmp_path / f"net{programs.SUFFIXES[kind]}"
    assert dctc("export", model, "--format", kind, "--net", net, "--out", file)[0] == 0
    (check_onnx if kind == "onnx" else check_torch)(model, file, net)


def test_a_program_that_differs_is_not_written(
    dctc: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = programs._read_torch

    def off(file: Path) -> Callable[[Tensor], Tensor]:
        program = read(file)
        return lambda raw: program(raw) + 2e-4 * (raw.shape[2] == 33)

    monkeypatch.setattr(programs, "_read_torch", off)
    code, message = dctc("export", model_of(tmp_path), "--format", "torch")
    assert code == 2
    assert "2.0e-04" in message
    assert "3x4x33x50" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_one_message(dctc: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """torch's own writer would abort the interpreter there."""
    model = model_of(tmp_path)
    with small_disk(tmp_path / "disk", 1 << 16):
        code, message = dctc("export", model, "--format", "torch", "--out", tmp_path / "disk" / "x.pt2")
        assert code == 2
        assert "x.pt2: cannot be written (No space left on device)" in message
        assert list((tmp_path / "disk").iterdir()) == []


def test_what_cannot_be_exported_is_said_in_one_line(
    dctc: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--format", "onnx", "--net", "s3"), "it has s1, s2, mean, teacher"),
        (("--format", "torch", "--out", blocked / "x.pt2"), "cannot be written"),
        (("--format", "torch", "--register", "towns"), "--format mlflow"),
        (("--format", "mlflow", "--register", "towns #1"), "--register towns #1: an address models:/NAME cannot have"),
    ]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cases.append((("--format", "onnx"), "[onnx]"))
    for options, part in cases:
        code, message = dctc("export", model, *options)
        assert code == 2
        assert part in message
        assert len(message.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.safetensors"]
