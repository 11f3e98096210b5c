"""``network.weights``: encoders that begin with the weights of a local file; timm has a stand-in, files are real."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dctc.config import load_config
from dctc.methods import Method
from dctc.networks import NetworkSpec, build_encoder
from dctc.networks.pretrained import UnfitWeights, adapted, fit
from dctc.networks.timm_unet import Encoder, fit_weights
from dctc.train import command
from shards.errors import InputError
from tests.golden.pretrained import STAND_IN, fresh, trained, written
from tests.stand_in import timm as stand_in
from tests.tiny import ROOT, run


def encoders(method: Method) -> dict[str, Encoder]:
    parts = {name: [m for m in part.modules() if isinstance(m, Encoder)] for name, part in method.parts.items()}
    return {name: found[0] for name, found in parts.items() if found}


def begins_with(encoder: Encoder, state: dict[str, Tensor]) -> bool:
    trunk = encoder.trunk[0].state_dict()
    return all(torch.equal(value, state[name.replace("stages_", "stages.")]) for name, value in trunk.items())


# ---- where they go


@pytest.mark.parametrize(
    ("method", "having"),
    [
        ("dctc", {"teacher", "encoder"}),
        ("supervised", {"network"}),
        ("mean_teacher", {"s1", "ema"}),
        ("cps", {"s1", "s2"}),
        ("dst_cbc", {"s1", "labeller"}),
    ],
)
def test_they_arrive_in_all_encoders_and_nowhere_else(
    timm: None, tmp_path: Path, tiny_dataset: Path, file: Path, method: str, having: set[str]
) -> None:
    """What stays random, decoders and channel attention, is what it is without the file."""
    config = written(tmp_path, tiny_dataset, file, method)
    (begun, located), (plain, _) = fresh(config), fresh(config, "network.weights=null")
    assert encoders(begun).keys() == encoders(plain).keys() == having
    assert all(begins_with(encoder, trained()) for encoder in encoders(begun).values())
    assert not any(begins_with(encoder, trained()) for encoder in encoders(plain).values())
    assert located.progress.weights == hashlib.sha256(file.read_bytes()).hexdigest()
    for name, part in begun.parts.items():
        expected = plain.parts[name].state_dict()
        rest = {key: value for key, value in part.state_dict().items() if "trunk." not in key}
        assert all(torch.equal(value, expected[key]) for key, value in rest.items())
        assert name == "encoder" or rest, "a decoder, at least"


def test_the_trunk_computes_what_the_whole_network_computes(timm: None) -> None:
    whole = stand_in.create_model("small", pretrained=False)
    assert isinstance(whole, stand_in.Whole)
    whole.load_state_dict(trained())
    encoder = cast(Encoder, build_encoder(NetworkSpec(3, 2, "timm_unet", 4, backbone="small"), attention=False))
    encoder.begin_with(fit_weights("small", 3, trained()))
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images)[-1], whole.eval().stages(images))


def test_nothing_is_drawn_from_the_global_generator(timm: None) -> None:
    state = trained()
    before = torch.get_rng_state()
    fit_weights("small", 4, state)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("save", ["safetensors", "pth", "half", "no classifier", "other classes", "no counters"])
def test_forms_of_a_file(timm: None, tmp_path: Path, tiny_dataset: Path, save: str) -> None:
    """The name of the file does not matter; half precision becomes float32; a classifier may be any or none."""
    state = {name: value.half() if save == "half" and value.dtype != torch.int64 else value
             for name, value in trained().items()}  # fmt: skip
    expected = {name: value.float() if value.dtype == torch.float16 else value for name, value in state.items()}
    if save == "other classes":
        state |= {"head.weight": torch.zeros(2, 14), "head.bias": torch.zeros(2)}
    if save == "no classifier":
        state = {name: value for name, value in state.items() if not name.startswith(("head", "norm"))}
    if save == "no counters":  # as files of torch before 0.4.1, and many made from TensorFlow's
        state = {name: value for name, value in state.items() if value.dtype != torch.int64}
        expected |= {name: torch.tensor(0) for name in expected if name not in state}
    path = tmp_path / "weights.bin"
    if save == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    method, _ = fresh(written(tmp_path, tiny_dataset, path))
    assert all(begins_with(encoder, expected) for encoder in encoders(method).values())


# ---- bands


def numpy_adapted(weight: Tensor, bands: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One band: the sum over red, green and blue. Others: tiled, cut, and scaled by 3/bands."""
    values = weight.numpy()
    if bands == 1:
        return np.asarray(values[:, :1] + values[:, 1:2] + values[:, 2:], np.float32)
    tiled = np.tile(values, (1, -(-bands // 3), 1, 1))[:, :bands]
    return np.asarray(tiled * (3 / bands), np.float32)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 8])
def test_any_number_of_bands(timm: None, bands: int) -> None:
    state = trained()
    fitted = fit_weights("small", bands, state)
    first = fitted.pop("stages_0.0.weight")
    assert first.shape == (6, bands, 3, 3)
    np.testing.assert_allclose(first.numpy(), numpy_adapted(state["stages.0.0.weight"], bands), rtol=1e-6)
    assert all(torch.equal(value, state[name.replace("stages_", "stages.")]) for name, value in fitted.items())


@pytest.mark.parametrize("bands", [1, 3, 6])
def test_grey_images_give_what_they_gave(bands: int) -> None:
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float16)
    grey = torch.randn(2, 1, 9, 9)
    before = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight.float())
    after = nn.functional.conv2d(grey.expand(-1, bands, -1, -1), adapted(weight, bands))
    torch.testing.assert_close(after, before)


def test_a_file_of_the_bands_of_the_run_is_taken_as_it_is(timm: None) -> None:
    state = trained(bands=4)
    assert torch.equal(fit_weights("small", 4, state)["stages_0.0.weight"], state["stages.0.0.weight"])
    with pytest.raises(UnfitWeights, match=r"stages\.0\.0\.weight is \[6, 4, 3, 3\], .* \[6, 5, 3, 3\] or \[6, 3, 3"):
        fit_weights("small", 5, state)


def test_a_first_convolution_of_something_else_than_the_image_is_not_adapted() -> None:
    """TResNet's sees 4 x 4 pixels of the three bands."""
    trunk, whole = {"body_conv.weight": torch.zeros(8, 64, 3, 3)}, {"body.conv.weight": torch.zeros(8, 48, 3, 3)}
    with pytest.raises(UnfitWeights, match=r"body\.conv\.weight of \[8, 48, 3, 3\] is for three bands, and only that"):
        fit(trunk, whole, dict(whole), "tresnet_m")


@pytest.mark.parametrize("prefix", ["", "model.", "body."])
def test_trunks_that_hold_the_network_whole(prefix: str) -> None:
    trunk = {f"{prefix}stem.weight": torch.zeros(2), f"{prefix}stages.0.weight": torch.zeros(3)}
    whole = {"stem.weight": torch.ones(2), "stages.0.weight": torch.ones(3), "head.weight": torch.ones(4)}
    assert {name: value.sum() for name, value in fit(trunk, whole, whole, "x").items()} == {
        f"{prefix}stem.weight": 2, f"{prefix}stages.0.weight": 3,
    }  # fmt: skip
    with pytest.raises(UnfitWeights, match=r"no file serves backbone 'x': .* a tensor other\.weight"):
        fit({"other.weight": torch.zeros(2)}, whole, whole, "x")
    with pytest.raises(UnfitWeights, match=r"no file serves backbone 'x': .* a tensor a_b"):
        fit({"a.b": torch.zeros(2), "a_b": torch.zeros(2)}, {"a.b": torch.zeros(2)}, whole, "x")


# ---- what is refused


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def _missing(path: Path) -> None:
    pass


def _text(path: Path) -> None:
    path.write_text("these are not the weights\n")


def _short(path: Path) -> None:
    save_file(trained(), path)
    path.write_bytes(path.read_bytes()[:-100])


def _trap(path: Path) -> None:
    torch.save(trained() | {"more": Trap(path.parent / "executed")}, path)


def _plain_trap(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.parent / "executed")))


def _namespace(path: Path) -> None:
    torch.save({"state_dict": trained(), "args": argparse.Namespace(epochs=3)}, path)


def _torn(path: Path) -> None:
    torch.save(trained(), path)
    path.write_bytes(path.read_bytes()[:3000])


def _checkpoint(path: Path) -> None:
    torch.save({"state_dict": trained(), "epoch": 3}, path)


def _list(path: Path) -> None:
    torch.save(list(trained().values()), path)


def _numbers(path: Path) -> None:
    torch.save({0: torch.zeros(1), 1: torch.zeros(1)}, path)


def _folder(path: Path) -> None:
    path.mkdir()


def _other(kind: str) -> Callable[[Path], None]:
    return lambda path: save_file(trained(kind), path)


def _without(path: Path) -> None:
    state = trained()
    del state["stages.1.0.weight"], state["stages.2.1.running_mean"]
    save_file(state, path)


def _integers(path: Path) -> None:
    save_file(trained() | {"stages.0.0.weight": torch.zeros(6, 3, 3, 3, dtype=torch.int32)}, path)


@pytest.mark.parametrize(
    ("make", "overrides", "words"),
    [
        (_missing, [], ["no such file", "docs/training.md"]),
        (_text, [], ["neither a safetensors file", "nor one of torch.save"]),
        (_short, [], ["neither a safetensors file"]),
        (_trap, [], ["holds more than tensors (posix.mkdir), and nothing in it is run"]),
        (_namespace, [], ["holds more than tensors (argparse.Namespace)", "save model.state_dict() alone"]),
        (_plain_trap, [], ["damaged, or not tensors that torch.save wrote"]),
        (_torn, [], ["damaged, or not tensors that torch.save wrote"]),
        (_checkpoint, [], ["holds no tensors by name but a mapping of state_dict, epoch"]),
        (_list, [], ["holds no tensors by name but list"]),
        (_numbers, [], ["holds no tensors by name but a mapping of 0, 1"]),
        (_folder, [], ["no such file"]),
        (_other("wide"), [], ["tensor stages.0.0.weight is [8, 3, 3, 3]", "backbone 'small' needs [6, 3, 3, 3]"]),
        (_other("deep"), [], ["tensor stages.3.0.bias is none of backbone 'small' (7 such)"]),
        (_other("small"), ["network.backbone=deep"], ["no tensor stages.3.0.weight", "'deep'", "6 of 24 are"]),
        (_without, [], ["no tensor stages.1.0.weight", "'small'", "(2 of 18 are missing)"]),
        (_integers, [], ["tensor stages.0.0.weight is torch.int32", "needs torch.float32"]),
        (_other("small"), ["network.name=unet", "network.backbone=''"], ["network unet has no backbone"]),
        (_missing, ["network.name=u2net", "network.backbone=''"], ["network u2net has no backbone"]),
    ],
)  # fmt: skip
def test_what_is_refused(
    timm: None, tmp_path: Path, tiny_dataset: Path, make: Callable[[Path], None], overrides: list[str], words: list[str]
) -> None:
    """By the command, with code 2 and one sentence that names key and file, and before anything is written."""
    path = tmp_path / "weights.pt"
    make(path)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert command([str(written(tmp_path, tiny_dataset, path)), *overrides]) == 2
    (line,) = told.getvalue().splitlines()
    assert line.startswith(f"error: key network.weights is '{path}': ")
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "runs").exists()


def test_a_url_is_refused_with_its_key(tmp_path: Path, tiny_dataset: Path, file: Path) -> None:
    with pytest.raises(InputError, match=r"key network\.weights is 'https://x/w\.pth': nothing is downloaded"):
        load_config(written(tmp_path, tiny_dataset, file), ["network.weights=https://x/w.pth"])


def test_the_command_refuses_a_missing_file_and_a_missing_library(tmp_path: Path, tiny_dataset: Path) -> None:
    """In a process of its own, as users meet it."""
    config = written(tmp_path, tiny_dataset, tmp_path / "none.safetensors")
    done = run("dctc", "train", config, check=False, PYTHONPATH=STAND_IN)
    assert done.returncode == 2
    assert f"error: key network.weights is '{tmp_path}/none.safetensors': no such file" in done.stderr
    bare = run("dctc", "train", config, check=False, PYTHONPATH=str(ROOT))
    assert bare.returncode == 2
    assert "key network.backbone is 'small': network timm_unet needs timm and torchvision" in bare.stderr
