"""The self-describing model file: what goes in comes out bit for bit, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dctc.bundle import DIGEST_KEY, METADATA_KEY, SCHEMA_VERSION, Bundle, Description, digest, save_bundle
from dctc.methods import Method, build_method, inference
from dctc.networks import NetworkSpec
from shards.errors import InputError
from shards.manifest import ClassInfo

SPEC = NetworkSpec(bands=3, classes=4, width=4)
MEAN, STD = [100.0, 0.25, -3.0], [20.0, 0.0, 7.5]  # the second band never varies
DESCRIPTION = Description(
    method="dctc",
    options={"temperature": 0.25, "attention": True},
    network=SPEC,
    bands=["red", "green", "nir"],
    dtype="uint16",
    mean=MEAN,
    std=STD,
    classes=[ClassInfo(name=f"class {k}", color=(k, 2 * k, 255 - k)) for k in range(4)],
    tile_size=64,
    dataset="0" * 64,
    rounds=12,
    run_id="abc",
)


def method_of(description: Description, seed: int = 0) -> Method:
    """A method whose batch-norm statistics have moved, too."""
    torch.manual_seed(seed)
    method = build_method(description.method, description.network, description.options)
    for module in method.parts.values():
        for name, buffer in module.named_buffers():
            if not name.endswith("num_batches_tracked"):
                buffer.uniform_(0.5, 1.5)
    return method


def weights(method: Method) -> dict[str, dict[str, torch.Tensor]]:
    return {name: module.state_dict() for name, module in method.parts.items()}


def saved(folder: Path, description: Description = DESCRIPTION) -> tuple[Path, Method]:
    path = folder / "model.safetensors"
    method = method_of(description)
    save_bundle(path, description, weights(method))
    return path, method


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """The file again after ``change(tensors, description record)``."""
    tensors, metadata = contents(path)
    record = json.loads(metadata[METADATA_KEY])
    change(tensors, record)
    text = json.dumps(record)
    save_file(tensors, path, {METADATA_KEY: text, DIGEST_KEY: digest(text, tensors)})
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        Bundle.load(path)
    message = str(caught.value)
    assert str(path) in message
    return message


# ---- round trip


@pytest.mark.parametrize("name", ["dctc", "supervised"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_round_trip_is_bit_equal(tmp_path: Path, name: str, norm: str) -> None:
    options = {"attention": True} if name == "supervised" else DESCRIPTION.options
    description = replace(DESCRIPTION, method=name, options=options, network=replace(SPEC, norm=norm))
    path, method = saved(tmp_path, description)
    bundle = Bundle.load(path)
    assert bundle.description == description
    assert (bundle.bands, bundle.dtype, bundle.mean) == (description.bands, "uint16", MEAN)
    assert (bundle.classes, bundle.tile_size, bundle.headline) == (description.classes, 64, "s1")
    raw = torch.randint(0, 400, (2, 3, 21, 35), dtype=torch.int32)
    scaled = (raw.float() - torch.tensor(MEAN)[:, None, None]) / torch.tensor([20.0, 1.0, 7.5])[:, None, None]
    with inference(*method.parts.values()):
        expected = method.logits(scaled)
    got = bundle.logits(raw)
    assert got.keys() == expected.keys()
    for net, logits in expected.items():
        assert torch.equal(got[net], logits), net


def test_every_tensor_is_in_the_file_by_part_and_name(tmp_path: Path) -> None:
    path, method = saved(tmp_path)
    tensors, metadata = contents(path)
    expected = {f"{part}.{key}": value for part, m in method.parts.items() for key, value in m.state_dict().items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    assert set(metadata) == {METADATA_KEY, DIGEST_KEY}
    assert json.loads(metadata[METADATA_KEY])["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.float32, torch.float64])
def test_any_real_pixel_type(tmp_path: Path, dtype: torch.dtype) -> None:
    bundle = Bundle.load(saved(tmp_path)[0])
    raw = torch.arange(3 * 16 * 16).reshape(1, 3, 16, 16) % 100
    assert torch.equal(bundle.logits(raw.to(dtype))["mean"], bundle.logits(raw.float())["mean"])


def test_a_loaded_model_predicts_without_gradients_in_evaluation_mode(tmp_path: Path) -> None:
    bundle = Bundle.load(saved(tmp_path)[0])
    before = {k: v.clone() for k, v in bundle.method.parts["encoder"].state_dict().items()}
    first = bundle.logits(torch.zeros(1, 3, 16, 16))["s1"]
    assert not first.requires_grad
    assert not any(module.training for part in bundle.method.parts.values() for module in part.modules())
    assert torch.equal(bundle.logits(torch.zeros(2, 3, 16, 16))["s1"][:1], first)
    assert all(torch.equal(v, before[k]) for k, v in bundle.method.parts["encoder"].state_dict().items())


def test_the_description_survives_its_text() -> None:
    for description in (DESCRIPTION, replace(DESCRIPTION, run_id=None, options={}, rounds=0)):
        assert Description.from_json(description.to_json(), Path("x")) == description


def test_channels_last_weights_are_saved(tmp_path: Path) -> None:
    method = method_of(DESCRIPTION)
    for module in method.parts.values():
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    save_bundle(tmp_path / "m.safetensors", DESCRIPTION, weights(method))
    loaded = Bundle.load(tmp_path / "m.safetensors").method
    for name, module in method.parts.items():
        for key, value in module.state_dict().items():
            assert torch.equal(loaded.parts[name].state_dict()[key], value)


# ---- writing


def test_writing_replaces_the_whole_file_and_leaves_no_draft(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    before = path.read_bytes()
    save_bundle(path, replace(DESCRIPTION, rounds=13), weights(method_of(DESCRIPTION, seed=1)))
    assert path.read_bytes() != before
    assert Bundle.load(path).description.rounds == 13
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = saved(tmp_path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_bundle(path, replace(DESCRIPTION, rounds=13), weights(method_of(DESCRIPTION, seed=1)))
    assert path.read_bytes() == before


def test_the_same_model_makes_the_same_bytes(tmp_path: Path) -> None:
    path, method = saved(tmp_path)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest()}
    for _ in range(8):  # safetensors itself orders metadata at random
        save_bundle(tmp_path / "again.safetensors", DESCRIPTION, weights(method))
        digests.add(hashlib.sha256((tmp_path / "again.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


# ---- what is no model


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "no such model file" in refused(tmp_path / "model.safetensors")
    assert "no such model file" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path, _ = saved(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert "not a readable safetensors file" in refused(path)


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x00" * 8])
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path, _ = saved(tmp_path)
    path.write_bytes(header + path.read_bytes()[8:])
    refused(path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "was run"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    for name, write in (("a.safetensors", pickle.dump), ("b.safetensors", torch.save)):
        with (tmp_path / name).open("wb") as file:
            write(Trap(), file)
        assert "a pickle" in refused(tmp_path / name)
    assert not marker.exists()


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    for name, metadata in (("a.safetensors", None), ("b.safetensors", {"format": "pt"})):
        save_file({"weight": torch.zeros(2)}, tmp_path / name, metadata)
        assert "not a model of dctc" in refused(tmp_path / name)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    message = refused(rewritten(path, lambda _, record: record.update(schema_version=SCHEMA_VERSION + 1)))
    assert f"schema {SCHEMA_VERSION + 1}" in message
    assert "update dctc" in message


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in refused(path)
    text = contents(saved(tmp_path)[0])[1][METADATA_KEY]
    path.write_bytes(path.read_bytes().replace(b"class 1", b"class 7"))
    assert contents(path)[1][METADATA_KEY] != text
    assert "SHA-256" in refused(path)


def test_a_file_of_the_first_schema_has_no_digest_and_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path)[0]
    tensors, metadata = contents(path)
    record = json.loads(metadata[METADATA_KEY]) | {"schema_version": 1}
    save_file(tensors, path, {METADATA_KEY: json.dumps(record)})
    assert Bundle.load(path).description == DESCRIPTION
    record["schema_version"] = SCHEMA_VERSION
    save_file(tensors, path, {METADATA_KEY: json.dumps(record)})
    assert "SHA-256" in refused(path)


def set_key(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, record: record.__setitem__(key, value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tensors, _: tensors.pop("s1.head.bias"), id="missing tensor"),
        pytest.param(lambda tensors, _: tensors.pop("teacher.encoder.blocks.0.1.running_mean"), id="missing buffer"),
        pytest.param(lambda tensors, _: tensors.update({"s1.extra": torch.zeros(1)}), id="surplus tensor in a part"),
        pytest.param(lambda tensors, _: tensors.update({"other.weight": torch.zeros(1)}), id="surplus part"),
        pytest.param(lambda tensors, _: tensors.update({"s1.head.bias": torch.zeros(5)}), id="wrong shape"),
        pytest.param(lambda _, record: record.pop("schema_version"), id="no schema"),
        pytest.param(lambda _, record: record.pop("bands"), id="no bands"),
        pytest.param(set_key("surprise", 1), id="unknown key"),
        pytest.param(set_key("method", "other"), id="unknown method"),
        pytest.param(set_key("options", {"sharpn": "s1"}), id="unknown option"),
        pytest.param(set_key("options", {"temperature": 2.0}), id="option out of range"),
        pytest.param(set_key("options", None), id="options of another type"),
        pytest.param(set_key("options", {"attention": False}), id="options of other weights"),
        pytest.param(set_key("network", {"bands": 3, "classes": 4, "width": 8}), id="network of another width"),
        pytest.param(set_key("network", {"bands": 0, "classes": 4}), id="network of no bands"),
        pytest.param(set_key("network", {"bands": 3, "classes": 4, "name": "other"}), id="unknown network"),
        pytest.param(set_key("network", 3), id="network of another type"),
        pytest.param(set_key("classes", [{"name": "a"}]), id="class without a colour"),
        pytest.param(set_key("network", {"bands": 3, "classes": 4, "width": 10**7}), id="network larger than memory"),
        pytest.param(lambda tensors, _: tensors.update({"s1.head.bias": tensors["s1.head.bias"].half()}), id="half"),
        pytest.param(set_key("dtype", "float64"), id="unknown pixel type"),
        pytest.param(set_key("tile_size", 0), id="no tile"),
        pytest.param(set_key("tile_size", "64"), id="tile size of another type"),
        pytest.param(set_key("mean", [1.0, float("nan"), 0.0]), id="mean that is no number"),
        pytest.param(set_key("std", [1.0, -1.0, 1.0]), id="negative deviation"),
        pytest.param(set_key("mean", ["1", "2", "3"]), id="means as texts"),
        pytest.param(set_key("bands", [1, 2, 3]), id="bands without names"),
        pytest.param(set_key("bands", ["red"]), id="fewer bands than the network"),
        pytest.param(set_key("mean", [0.0]), id="fewer means than bands"),
        pytest.param(set_key("std", [1.0] * 4), id="more deviations than bands"),
        pytest.param(lambda _, record: record["classes"].pop(), id="fewer classes than the network"),
    ],
)
def test_a_tampered_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> None:
    path, _ = saved(tmp_path)
    refused(rewritten(path, change))


def test_a_description_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    tensors, _metadata = contents(path)
    for text in ("", "{", "[]", "3", "null", '"dctc"'):
        save_file(tensors, path, {METADATA_KEY: text})
        refused(path)
