"""Networks of timm behind the interface of all others: with a stand-in for the library, and without the library."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dctc.bundle import Bundle, Description, save_bundle
from dctc.engine.flops import round_flops
from dctc.engine.recompute import recompute_blocks
from dctc.methods import build_method
from dctc.networks import NetworkSpec, UnavailableBackbone, build_decoder, build_encoder, build_network
from shards.errors import InputError
from shards.manifest import ClassInfo
from tests.golden.rounds import ADAM, batches, by_term, run_round, updater
from tests.tiny import run, write_config


def spec(**changes: Any) -> NetworkSpec:
    values: dict[str, Any] = {"bands": 4, "classes": 5, "name": "timm_unet", "width": 4, "backbone": "small"}
    return NetworkSpec(**values | changes)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("height", "breadth"), [(32, 32), (33, 47), (7, 9)])
def test_any_size(timm: None, height: int, breadth: int, attention: bool) -> None:
    network = build_network(spec(), attention).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, 4, height, breadth))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 5, height, breadth)
    assert logits.std() > 0


def test_skips_of_every_scale_reach_the_logits(timm: None) -> None:
    encoder, decoder = build_encoder(spec()).eval(), build_decoder(spec()).eval()
    features = [feature.detach().requires_grad_() for feature in encoder(torch.randn(1, 4, 16, 16))]
    decoder(features, (16, 16)).square().sum().backward()
    assert [tuple(f.shape[1:]) for f in features] == [(6, 8, 8), (10, 4, 4), (14, 2, 2)]
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in features)


@pytest.mark.parametrize(
    ("backbone", "norm", "words"),
    [
        ("fixed", "batch", r"'fixed' does not take images of any size \(Input height .*24.*resnet34"),
        ("last", "batch", r"'last' makes maps of the shapes .*\(1, 8, 12, 6\).* where .*\(1, 6, 8, 12\).*resnet34"),
        ("small", "group", r"'small' has batch norms, which network\.norm=group does not replace"),
    ],
)
def test_a_backbone_that_does_not_serve_is_refused(timm: None, backbone: str, norm: str, words: str) -> None:
    with pytest.raises(UnavailableBackbone, match=words):
        build_network(spec(backbone=backbone, norm=norm))


def test_norms_of_the_trunk(timm: None) -> None:
    """``sync`` turns them into synchronised ones, and group norm goes with a trunk that has none of its own."""
    kinds = [type(m) for m in build_encoder(spec(norm="sync")).modules() if isinstance(m, _NormBase)]
    assert kinds == [nn.SyncBatchNorm] * 3
    assert build_encoder(spec()).training
    with torch.no_grad():
        assert build_network(spec(backbone="normless", norm="group"))(torch.randn(1, 4, 9, 9)).shape == (1, 5, 9, 9)


def test_the_trunk_is_recomputed_too(timm: None) -> None:
    """Values, gradients and running statistics stay what they were."""
    images = torch.randn(2, 4, 16, 16)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = build_network(spec())
        if recompute:
            assert recompute_blocks(network.encoder) == 1
            assert recompute_blocks(network.decoder) == 2
        network(images).square().mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        found.append([*(p.grad for p in network.parameters()), *network.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operations_are_counted_trunk_and_decoder(timm: None) -> None:
    """Multiplications and additions of each convolution at a tile of 16 px, by hand."""
    trunk = 2 * 9 * (4 * 6 * 8**2 + 6 * 10 * 4**2 + 10 * 14 * 2**2)
    first, second = (14 + 10) * 8 + 8 * 8, (8 + 6) * 4 + 4 * 4  # two convolutions a scale
    forward = trunk + 2 * 9 * (first * 4**2 + second * 8**2) + 2 * 4 * 5 * 8**2
    of_the_image = 2 * 9 * 4 * 6 * 8**2  # nobody asks for its gradient
    assert round_flops("supervised", spec(), {}, 1, 0, 16) == 3 * forward - of_the_image


def test_dctc_trains_it_and_its_model_file_loads(timm: None, tmp_path: Path) -> None:
    chosen = spec(bands=3, classes=4)
    torch.manual_seed(0)
    method = build_method("dctc", chosen, {})
    run_one = updater(method, ADAM)
    labelled, unlabelled = batches(0)
    history = [by_term(run_round(method, run_one, [labelled], [unlabelled], 0)) for _ in range(5)]
    assert history[-1]["teacher"] < history[0]["teacher"]
    classes = [ClassInfo(name=name, color=(0, 0, 0)) for name in "abcd"]
    description = Description("dctc", {}, chosen, ["r", "g", "b"], "uint8", [0.0] * 3, [1.0] * 3, classes, 32, "d")
    save_bundle(tmp_path / "m.safetensors", description, {n: m.state_dict() for n, m in method.parts.items()})
    loaded = Bundle.load(tmp_path / "m.safetensors")
    images = torch.randn(1, 3, 32, 32)
    for module in method.parts.values():
        module.eval()
    with torch.no_grad():
        assert torch.equal(loaded.logits(images)["s1"], method.logits(images)["s1"])


def test_a_model_file_from_before_there_were_backbones_loads(tmp_path: Path) -> None:
    network = NetworkSpec(3, 2, width=4)
    classes = [ClassInfo(name=name, color=(0, 0, 0)) for name in "ab"]
    description = Description(
        "supervised", {}, network, ["r", "g", "b"], "uint8", [0.0] * 3, [1.0] * 3, classes, 32, "d"
    )
    record = json.loads(description.to_json())
    del record["network"]["backbone"]
    assert Description.from_json(json.dumps(record), tmp_path / "m").network == network


def test_a_backbone_where_there_is_none_to_have_and_the_other_way_round(timm: None) -> None:
    with pytest.raises(UnavailableBackbone, match="network unet takes no backbone, and 'resnet34' is set"):
        build_network(NetworkSpec(3, 2, backbone="resnet34"))
    with pytest.raises(UnavailableBackbone, match="network timm_unet needs the name of a backbone"):
        build_network(spec(backbone=""))
    with pytest.raises(UnavailableBackbone, match=r"backbone 'smal': timm cannot make .*Unknown model"):
        build_network(spec(backbone="smal"))


def test_without_the_library_a_run_says_what_to_install(tmp_path: Path, tiny_dataset: Path) -> None:
    """As it is here: timm and torchvision are not among what the tests install."""
    config = write_config(
        tmp_path / "timm.yaml", tiny_dataset, network={"name": "timm_unet", "backbone": "resnet34", "width": 4}
    )
    done = run("dctc", "train", config, check=False)
    assert done.returncode == 2
    assert "key network.backbone is 'resnet34': network timm_unet needs timm and torchvision" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UnavailableBackbone, match=r"needs timm and torchvision .*pip install"):
        build_network(spec())


def test_a_model_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = Description(
        "supervised", {}, spec(bands=1, classes=1), ["r"], "uint8", [0.0], [1.0],
        [ClassInfo(name="a", color=(0, 0, 0))], 32, "d",
    )  # fmt: skip
    save_bundle(tmp_path / "m.safetensors", description, {"network": {"w": torch.zeros(1)}})
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"m\.safetensors: network timm_unet needs timm and torchvision"):
        Bundle.load(tmp_path / "m.safetensors")
