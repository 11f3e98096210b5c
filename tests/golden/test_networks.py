"""Networks against the table of the method: parameter counts, equations 1-4 in numpy float64, any height and width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dctc.methods import Method, build_method
from dctc.networks import NetworkSpec, UnknownNetwork, build_decoder, build_encoder, build_network, network_names
from dctc.networks.channel_attention import ChannelAttention
from dctc.networks.unet import UNet

UNET = 31_037_958  # 3 bands in, 6 classes out, width 64
ATTENTION = 176_700
STUDENT_NETS = ("s1", "s2", "mean")


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def float64(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


def attention_in_numpy(module: ChannelAttention, features: Any) -> Any:
    """Equations 1-4, with the module's weights."""
    w1, b1 = float64(module.fc1.weight), float64(module.fc1.bias)
    w2, b2 = float64(module.fc2.weight), float64(module.fc2.bias)

    def vector(pooled: Any) -> Any:  # equations 1 and 2: FC2(RELU(FC1(pooled)))
        return np.maximum(pooled @ w1.T + b1, 0) @ w2.T + b2

    fused = vector(features.mean(axis=(2, 3))) + vector(features.max(axis=(2, 3)))
    weights = 1 / (1 + np.exp(-fused))  # equation 3
    return features * weights[:, :, None, None]  # equation 4


# ---- parameter counts


def test_parameter_counts_of_the_paper_sized_networks() -> None:
    with torch.device("meta"):
        assert parameters(UNet(3, 6)) == UNET
        assert parameters(UNet(3, 6, attention=True)) == UNET + ATTENTION
        method = build_method("dctc", NetworkSpec(3, 6), {})
        plain = build_method("dctc", NetworkSpec(3, 6), {"attention": False})
    counts = {name: parameters(module) for name, module in method.parts.items()}
    assert counts["teacher"] == UNET + ATTENTION
    assert parameters(plain.parts["teacher"]) == UNET
    assert counts["encoder"] + counts["s1"] == UNET
    assert counts["s1"] == counts["s2"]


@pytest.mark.parametrize(("channels", "hidden"), [(64, 4), (128, 8), (1024, 64), (16, 4), (8, 4), (63, 4), (100, 6)])
def test_attention_reduces_by_16_to_no_less_than_4(channels: int, hidden: int) -> None:
    module = ChannelAttention(channels)
    assert module.fc1.weight.shape == (hidden, channels)
    assert module.fc2.weight.shape == (channels, hidden)


# ---- channel attention


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 40), height=st.integers(1, 9), width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_attention_equals_the_equations(batch: int, channels: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = ChannelAttention(channels)
    features = torch.randn(batch, channels, height, width)
    weighed = module(features)
    assert weighed.dtype == torch.float32
    expected = attention_in_numpy(module, float64(features))
    np.testing.assert_allclose(float64(weighed), expected, rtol=1e-5, atol=1e-7)
    exact = module.double()(features.double())  # the same maths, not only nearly the same numbers
    np.testing.assert_allclose(float64(exact), expected, rtol=1e-12, atol=1e-14)


def test_attention_at_zero_weights_halves_the_features() -> None:
    module = ChannelAttention(8)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    features = torch.randn(2, 8, 3, 3)
    assert torch.equal(module(features), features / 2)  # sigmoid(0) = 1/2


def test_attention_ends_each_block_before_the_pool_and_before_the_skip() -> None:
    torch.manual_seed(0)
    network = UNet(3, 4, width=4, attention=True).double().eval()
    encoder: Any = network.encoder
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    current, expected = images, []
    for stage, (block, attention) in enumerate(zip(encoder.blocks, encoder.attention, strict=True)):
        current = F.max_pool2d(current, 2) if stage else current
        current = torch.from_numpy(attention_in_numpy(attention, float64(block(current))))
        expected.append(current)
    features = encoder(images)
    assert [tuple(f.shape[1:]) for f in features] == [(4, 32, 48), (8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    for got, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_a_block_is_convolution_without_bias_norm_relu_twice() -> None:
    encoder: Any = build_encoder(NetworkSpec(5, 2, width=4))
    for stage, block in enumerate(encoder.blocks):
        assert [type(layer) for layer in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
        for convolution in (block[0], block[3]):
            assert convolution.bias is None
            assert convolution.kernel_size == (3, 3)
            assert convolution.out_channels == 4 * 2**stage
    assert not any(isinstance(module, ChannelAttention) for module in encoder.modules())


# ---- any bands, classes, width, norm, height and width


@settings(max_examples=40, deadline=None)
@given(
    bands=st.integers(1, 5), classes=st.integers(1, 7), width=st.integers(1, 6), attention=st.booleans(),
    norm=st.sampled_from(["batch", "group"]), height=st.integers(1, 49), breadth=st.integers(1, 49),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@example(bands=1, classes=2, width=2, norm="group", attention=True, height=1, breadth=16, seed=0)  # 1 px at the bottom
def test_logits_have_the_size_of_the_image(
    bands: int, classes: int, width: int, norm: str, attention: bool, height: int, breadth: int, seed: int
) -> None:
    torch.manual_seed(seed)
    network = build_network(NetworkSpec(bands, classes, width=width, norm=norm), attention).eval()
    with torch.no_grad():
        logits = network(torch.randn(1, bands, height, breadth))
    assert logits.shape == (1, classes, height, breadth)
    assert bool(logits.isfinite().all())


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 49), breadth=st.integers(1, 49), attention=st.booleans())
def test_an_odd_size_equals_the_padded_image_cropped(height: int, breadth: int, attention: bool) -> None:
    torch.manual_seed(1)
    network = build_network(NetworkSpec(2, 3, width=4), attention).eval()
    images = torch.randn(2, 2, height, breadth)
    rows = torch.arange(-(-height // 16) * 16).clamp(max=height - 1)  # the last row and column repeated to the stride
    columns = torch.arange(-(-breadth // 16) * 16).clamp(max=breadth - 1)
    with torch.no_grad():
        whole = network(images[:, :, rows][:, :, :, columns])
        assert torch.equal(network(images), whole[..., :height, :breadth])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_odd_sizes_train(norm: str) -> None:
    torch.manual_seed(0)
    network = build_network(NetworkSpec(4, 3, width=4, norm=norm), attention=True).train()
    network(torch.randn(2, 4, 33, 21)).square().mean().backward()
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert idle == []


def test_group_norm_does_not_mix_images_and_batch_norm_does() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for norm, apart in (("group", True), ("batch", False)):
        network = build_network(NetworkSpec(3, 2, width=4, norm=norm)).train()
        with torch.no_grad():
            both, first = network(images), network(images[:1])
        assert torch.allclose(both[:1], first, atol=1e-5) is apart


# ---- students


def built(seed: int = 0) -> Method:
    torch.manual_seed(seed)
    return build_method("dctc", NetworkSpec(3, 4, width=4), {})


def logits_of(method: Method, images: Tensor) -> dict[str, Tensor]:
    for module in method.parts.values():
        module.eval()
    with torch.no_grad():
        return {name: z.clone() for name, z in method.logits(images).items()}


def changed_by(change: Callable[[Method], nn.Module]) -> set[str]:
    """Which nets answer differently after a part of a method has moved."""
    method, images = built(), torch.randn(1, 3, 32, 32)
    before = logits_of(method, images)
    with torch.no_grad():
        for parameter in change(method).parameters():
            parameter.mul_(1.5).add_(0.01)
    after = logits_of(method, images)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_two_decoders_start_different() -> None:
    method = built()
    first, second = (dict(method.parts[name].named_parameters()) for name in ("s1", "s2"))
    assert first.keys() == second.keys()
    weights = [name for name, parameter in first.items() if parameter.dim() > 1]
    assert len(weights) == 4 + 8 + 1  # transposed convolutions, convolutions, head
    assert not [name for name in weights if torch.equal(first[name], second[name])]
    z = logits_of(method, torch.randn(1, 3, 16, 16))
    assert not torch.allclose(z["s1"], z["s2"], atol=1e-3)


def test_the_students_share_one_encoder_and_nothing_else() -> None:
    assert changed_by(lambda method: method.parts["encoder"]) == {*STUDENT_NETS}
    assert changed_by(lambda method: method.parts["s1"]) == {"s1", "mean"}
    assert changed_by(lambda method: method.parts["s2"]) == {"s2", "mean"}
    assert changed_by(lambda method: method.parts["teacher"]) == {"teacher"}


def test_no_parameter_belongs_to_two_parts() -> None:
    method = built()
    assert set(method.parts) == {"teacher", "encoder", "s1", "s2"}
    places = [p.data_ptr() for module in method.parts.values() for p in module.parameters()]
    assert len(places) == len(set(places))


def test_the_mean_net_is_the_mean_of_the_students_probabilities() -> None:
    z = logits_of(built(), 3 * torch.randn(2, 3, 17, 23))
    expected = (torch.softmax(z["s1"].double(), 1) + torch.softmax(z["s2"].double(), 1)) / 2
    torch.testing.assert_close(torch.softmax(z["mean"].double(), 1), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(z["mean"].exp().double(), expected, rtol=1e-5, atol=1e-7)
    assert built().headline == "s1"


def test_the_seed_alone_decides_the_start() -> None:
    first, again, other = built(3), built(3), built(4)
    for name, module in first.parts.items():
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parts[name].parameters(), strict=True))
    assert not torch.equal(
        torch.cat([p.flatten() for p in first.parts["s1"].parameters()]),
        torch.cat([p.flatten() for p in other.parts["s1"].parameters()]),
    )


# ---- bad requests


def test_unknown_names_and_numbers_are_refused() -> None:
    assert "unet" in network_names()
    assert "channel_attention" not in network_names()
    for build in (build_encoder, build_decoder, build_network):
        with pytest.raises(UnknownNetwork, match=r"'unett'.*unet"):
            build(NetworkSpec(3, 2, name="unett"))
    with pytest.raises(ValueError, match=r"layer.*batch, sync, group"):
        NetworkSpec(3, 2, norm="layer")
    for bands, classes, width in ((0, 2, 4), (3, 0, 4), (3, 2, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            NetworkSpec(bands, classes, width=width)
