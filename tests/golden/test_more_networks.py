"""Attention U-Net and the U2-Nets: parameter counts by formula, forward passes written out, deep supervision."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from dctc.engine.recompute import recompute_blocks
from dctc.methods import build_method
from dctc.methods.losses import cross_entropy_sum, each, pixel_count
from dctc.networks import NetworkSpec, build_network, network_names
from dctc.networks.attention_unet import Gate
from dctc.networks.channel_attention import ChannelAttention
from dctc.networks.rsu import ResidualUBlock
from tests.golden.rounds import ADAM, batches, by_term, run_round, updater
from tests.tiny import losses, run, write_config
from tests.weights import folder_of

NAMES = ("attention_unet", "u2net", "u2net_small")


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conv(inputs: int, outputs: int, side: int = 3) -> int:
    return inputs * outputs * side * side + outputs


def layer(inputs: int, outputs: int) -> int:
    """A 3x3 convolution with bias, and its batch norm."""
    return conv(inputs, outputs) + 2 * outputs


def attention_unet(bands: int, classes: int) -> int:
    widths = [64, 128, 256, 512, 1024]
    total = sum(layer(a, b) + layer(b, b) for a, b in zip([bands, *widths], widths, strict=False))
    for deep, shallow in zip(widths[:0:-1], widths[-2::-1], strict=True):
        inner = shallow // 2
        gate = 2 * (conv(shallow, inner, 1) + 2 * inner) + conv(inner, 1, 1) + 2
        total += layer(deep, shallow) + gate + layer(2 * shallow, shallow) + layer(shallow, shallow)
    return total + conv(64, classes, 1)


def residual(depth: int, inputs: int, inner: int, outputs: int) -> int:
    """RSU-L has L inner layers down, L - 2 inner ones up, and one out; RSU-4F has 4, 2 and 1."""
    levels = depth or 4
    total = layer(inputs, outputs) + layer(outputs, inner) + (levels - 1) * layer(inner, inner)
    return total + (levels - 2) * layer(2 * inner, inner) + layer(2 * inner, outputs)


def u2net(bands: int, classes: int, small: bool) -> int:
    depths = (7, 6, 5, 4, 0, 0)
    outer = (64,) * 6 if small else (64, 128, 256, 512, 512, 512)
    inner = (16,) * 6 if small else (32, 32, 64, 128, 256, 256)
    total = sum(residual(*stage) for stage in zip(depths, (bands, *outer), inner, outer, strict=False))
    ups = (64,) * 5 if small else (512, 256, 128, 64, 64)
    up_inner = (16,) * 5 if small else (256, 128, 64, 32, 16)
    below = outer[5]
    for depth, skip, mid, out in zip((0, 4, 5, 6, 7), outer[4::-1], up_inner, ups, strict=True):
        total += residual(depth, below + skip, mid, out)
        below = out
    sides = sum(conv(channels, classes) for channels in (*ups, outer[5]))
    return total + sides + conv(6 * classes, classes, 1)


def test_parameter_counts() -> None:
    """By formulas of their own, and as they were stated or published (the last two for one class)."""
    with torch.device("meta"):
        counts = {name: parameters(build_network(NetworkSpec(3, 6, name))) for name in NAMES}
        published = {name: parameters(build_network(NetworkSpec(3, 1, name))) for name in NAMES}
    assert counts == {"attention_unet": 34_878_898, "u2net": 44_079_234, "u2net_small": 1_148_706}
    assert counts["attention_unet"] == attention_unet(3, 6)
    assert counts["u2net"] == u2net(3, 6, small=False)
    assert counts["u2net_small"] == u2net(3, 6, small=True)
    assert (published["u2net"], published["u2net_small"]) == (44_009_869, 1_131_181)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(NAMES), width=st.sampled_from([1, 3, 4, 16]), height=st.integers(1, 70),
    breadth=st.integers(1, 70), norm=st.sampled_from(["batch", "group"]), attention=st.booleans(),
)  # fmt: skip
def test_any_size_band_count_and_width(
    name: str, width: int, height: int, breadth: int, norm: str, attention: bool
) -> None:
    network = build_network(NetworkSpec(5, 3, name, width, norm), attention).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 5, height, breadth)).shape == (2, 3, height, breadth)


def test_the_gate_against_its_formula() -> None:
    torch.manual_seed(0)
    gate = Gate(6, "batch").double().eval()
    for module in gate.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.normal_()
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)
    signal, skip = torch.randn(2, 2, 6, 5, 4, dtype=torch.float64)

    def one_by_one(layers: nn.Module, x: Tensor) -> Tensor:
        convolution, norm = layers[0], layers[1]  # type: ignore[index]  # a Sequential
        y = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], x) + convolution.bias[:, None, None]
        scale = norm.weight / (norm.running_var + 1e-5) ** 0.5
        normal: Tensor = y * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]
        return normal

    inside = (one_by_one(gate.signal, signal) + one_by_one(gate.skip, skip)).clamp(min=0)
    expected = skip / (1 + torch.exp(-one_by_one(gate.weight, inside)))
    assert torch.allclose(gate(signal, skip), expected, atol=1e-12)


def dilations(layers: nn.ModuleList) -> list[int]:
    return [m.dilation[0] for layer in layers for m in layer.modules() if isinstance(m, nn.Conv2d)]


def test_a_residual_block_written_out() -> None:
    """RSU-4 and RSU-4F, layer by layer."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 13, 10)

    def up(x: Tensor, like: Tensor) -> Tensor:
        larger: Tensor = F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
        return larger

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, stride=2, ceil_mode=True)

    block = ResidualUBlock(4, 3, 4, 6, "batch").eval()
    entry = block.entry(images)
    h1 = block.downs[0](entry)
    h2 = block.downs[1](pool(h1))
    h3 = block.downs[2](pool(h2))
    h4 = block.downs[3](h3)
    d3 = block.ups[0](torch.cat([h4, h3], 1))
    d2 = block.ups[1](torch.cat([up(d3, h2), h2], 1))
    d1 = block.ups[2](torch.cat([up(d2, h1), h1], 1))
    assert torch.equal(block(images), d1 + entry)
    assert dilations(block.downs) == [1, 1, 1, 2]

    flat = ResidualUBlock(0, 3, 4, 6, "batch").eval()
    entry = flat.entry(images)
    maps = [flat.downs[0](entry)]
    for down in flat.downs[1:]:
        maps.append(down(maps[-1]))
    current = maps[-1]
    for layer_up, skip in zip(flat.ups, maps[2::-1], strict=True):
        current = layer_up(torch.cat([current, skip], 1))
    assert torch.equal(flat(images), current + entry)
    assert dilations(flat.downs) + dilations(flat.ups) == [1, 2, 4, 8, 4, 2, 1]


# ---- deep supervision


def test_the_loss_is_the_sum_over_seven_outputs() -> None:
    torch.manual_seed(0)
    network = build_network(NetworkSpec(3, 4, "u2net_small", 4, "group"))
    images, y = torch.randn(2, 3, 40, 33), torch.randint(0, 4, (2, 40, 33))
    y[0, :5] = 255
    outputs = network(images)
    assert isinstance(outputs, tuple)
    assert [tuple(z.shape) for z in outputs] == [(2, 4, 40, 33)] * 7
    expected = torch.stack([F.cross_entropy(z, y, ignore_index=255) for z in outputs]).sum()
    assert (cross_entropy_sum(outputs, y) / pixel_count(y)).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(network.eval()(images), outputs[0]), "the fused one is the prediction (group norm: no modes)"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["supervised", "dctc", "mean_teacher", "cps", "dst_cbc"])
def test_every_method_trains_every_network(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = build_method(method, NetworkSpec(3, 4, name, 4, "group"), {})
    run_one = updater(model, ADAM)
    labelled, unlabelled = batches(0)
    seen = [labelled.valid, labelled.valid], [unlabelled.valid, unlabelled.valid]
    labelled, unlabelled = (
        type(batch)(batch.images, batch.valid, batch.labels, [batch.images] * 2, valid)
        for batch, valid in zip((labelled, unlabelled), seen, strict=True)
    )
    history = [by_term(run_round(model, run_one, [labelled], [unlabelled], 0, [unlabelled])) for _ in range(4)]
    labelled_term = next(iter(history[0]))
    assert min(h[labelled_term] for h in history[1:]) < history[0][labelled_term], history
    assert all(math.isfinite(value) for h in history for value in h.values())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_can_be_recomputed(name: str) -> None:
    """Values, gradients and running statistics stay what they were."""
    images = torch.randn(2, 3, 32, 32)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = build_network(NetworkSpec(3, 4, name, 4, "batch"))
        if recompute:
            assert recompute_blocks(network) >= 9
        outputs = network(images)
        total = torch.stack([z.square().mean() for z in each(outputs)]).sum()
        torch.autograd.backward(total)
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        found.append([*gradients, *network.buffers()])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", NAMES)
def test_lower_precision_runs(name: str, dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    network = build_network(NetworkSpec(3, 4, name, 4, "group"))
    images, y = torch.randn(2, 3, 32, 32), torch.randint(0, 4, (2, 32, 32))
    full = each(network(images))
    with torch.autocast("cpu", dtype=dtype):
        outputs = network(images)
        loss = cross_entropy_sum(outputs, y)
    for z, exact in zip(each(outputs), full, strict=True):
        assert z.dtype == dtype
        assert (z.float() - exact).abs().max() < near * exact.abs().max()
    assert loss.dtype == torch.float32
    torch.autograd.backward(loss)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_size_trains_every_parameter(name: str, norm: str, attention: bool) -> None:
    network = build_network(NetworkSpec(4, 3, name, 4, norm), attention)
    outputs = network(torch.randn(2, 4, 33, 21))
    torch.autograd.backward(torch.stack([z.square().mean() for z in each(outputs)]).sum())
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_students_of_any_network_share_its_encoder(name: str) -> None:
    """And the teacher has channel attention at the end of each stage, nobody else any."""
    torch.manual_seed(0)
    method = build_method("dctc", NetworkSpec(3, 4, name, 4, "group"), {})
    for module in method.parts.values():
        module.eval().requires_grad_(False)
    images = torch.randn(1, 3, 32, 32)
    before = method.logits(images)
    assert not torch.allclose(before["s1"], before["s2"], atol=1e-3)
    for part, expected in {"encoder": {"s1", "s2", "mean"}, "s2": {"s2", "mean"}, "teacher": {"teacher"}}.items():
        for parameter in method.parts[part].parameters():
            parameter.mul_(1.5).add_(0.01)
        after = method.logits(images)
        assert {net for net in after if not torch.equal(after[net], before[net])} == expected
        before = after
    stages = {"attention_unet": 5}.get(name, 6)
    placed = {part: sum(isinstance(m, ChannelAttention) for m in net.modules()) for part, net in method.parts.items()}
    assert placed == {"teacher": stages, "encoder": 0, "s1": 0, "s2": 0}


@pytest.mark.matrix
def test_a_run_with_a_small_u2net_and_its_model_file(tmp_path: Path, tiny_dataset: Path) -> None:
    assert set(NAMES) < set(network_names())
    config = write_config(
        tmp_path / "u2.yaml", tiny_dataset, network={"name": "u2net_small", "width": 4, "norm": "group"},
        schedule={"rounds": 2},
    )  # fmt: skip
    run("dctc", "train", config)
    model = folder_of(config) / "model.safetensors"
    assert len(losses(folder_of(config))) == 2
    with safe_open(model, framework="pt") as file:
        assert json.loads(file.metadata()["dctc"])["network"]["name"] == "u2net_small"
    scored = run("dctc", "evaluate", model, tiny_dataset, "--json")
    assert set(json.loads(scored.stdout)["nets"]) == {"s1", "s2", "mean", "teacher"}
    scene = next((tiny_dataset.parent / "scenes").rglob("*_RGB.tif"))
    run("dctc", "predict", model, scene, "--out", tmp_path / "maps")
    assert list((tmp_path / "maps").glob("*.tif"))


def test_batch_norm_of_a_single_pixel_says_what_to_change(tmp_path: Path, tiny_dataset: Path) -> None:
    """U2-Net halves a tile of 32 px five times."""
    config = write_config(
        tmp_path / "one.yaml", tiny_dataset, "supervised", network={"name": "u2net_small", "norm": "batch"},
        data={"batch_labelled": 1},
    )  # fmt: skip
    done = run("dctc", "train", config, check=False)
    assert done.returncode == 1
    assert "error: batch norm has nothing to average" in done.stderr
    assert "network.norm=group" in done.stderr
    assert not (folder_of(config) / "model.safetensors").exists()
