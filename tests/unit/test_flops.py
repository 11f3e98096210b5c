"""Operations of a round against formulas worked out by hand, and the table of peaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dctc.engine.flops import FAR_ALONG, peak_flops, round_flops
from dctc.methods import build_method, method_names
from dctc.methods.base import Length
from dctc.networks import NetworkSpec, network_names

BANDS, CLASSES = 3, 6
BACKWARD = 2  # forwards: the gradient of the input and that of the weight cost one each


def convolution(inputs: int, outputs: int, kernel: int, size: int) -> int:
    """2 K K Cin Cout H W: H and W of the output, or of the input where the convolution is transposed."""
    return 2 * kernel * kernel * inputs * outputs * size * size


def encoder(width: int, size: int) -> int:
    """Forward of one image: two 3x3 convolutions a stage, each stage at half the size and twice the width."""
    total, inputs = 0, BANDS
    for stage in range(5):
        outputs, side = width * 2**stage, size // 2**stage
        total += convolution(inputs, outputs, 3, side) + convolution(outputs, outputs, 3, side)
        inputs = outputs
    return total


def decoder(width: int, size: int) -> int:
    """Forward of one image: up 2x2, two 3x3 convolutions, the first of which reads the skip as well; a 1x1 head."""
    total = convolution(width, CLASSES, 1, size)
    for stage in range(4):
        outputs, side = width * 2**stage, size // 2**stage
        total += convolution(2 * outputs, outputs, 2, side // 2)
        total += convolution(2 * outputs, outputs, 3, side) + convolution(outputs, outputs, 3, side)
    return total


def attention(width: int) -> int:
    """Forward of one image: FC1 and FC2 on the average and on the maximum of each stage."""
    channels = [width * 2**stage for stage in range(5)]
    return sum(2 * 2 * 2 * c * max(4, c // 16) for c in channels)


def trained(forward: int, width: int, size: int) -> int:
    """Forward and backward of one image; nobody asks for the gradient of the image itself."""
    return (1 + BACKWARD) * forward - convolution(BANDS, width, 3, size)


def counted(name: str, width: int = 4, size: int = 32, batches: tuple[int, int] = (1, 1), step: int = FAR_ALONG,
            rounds: int | None = None, **options: object) -> float:  # fmt: skip
    return round_flops(name, NetworkSpec(BANDS, CLASSES, width=width), options, *batches, size, step, rounds)


@pytest.mark.parametrize(("width", "size"), [(4, 16), (8, 48)])
def test_supervised_round_is_three_forwards_less_the_image_gradient(width: int, size: int) -> None:
    unet = encoder(width, size) + decoder(width, size)
    assert counted("supervised", width, size, (5, 0)) == 5 * trained(unet, width, size)


def test_a_size_between_strides_counts_as_padded() -> None:
    assert counted("supervised", size=17) == counted("supervised", size=32)


def test_dctc_round_by_hand() -> None:
    width, size, labelled, unlabelled = 16, 32, 2, 3
    e, d = encoder(width, size), decoder(width, size)
    teacher = e + d + attention(width)
    phase1 = labelled * trained(teacher, width, size)
    students = 2 * trained(e + d, width, size)
    phase2 = unlabelled * (teacher + students)  # the teacher labels once
    phase3 = unlabelled * (e + 2 * d + students)  # both students label from one encoder pass
    late = {"phase2_start": 5, "phase3_start": 9, "phase3_ramp": 1000}
    assert counted("dctc", width, size, (labelled, unlabelled), step=4, **late) == phase1
    assert counted("dctc", width, size, (labelled, unlabelled), step=8, **late) == phase1 + phase2
    assert counted("dctc", width, size, (labelled, unlabelled), **late) == phase1 + phase2 + phase3, "far along"


def test_starts_that_are_shares_of_a_run() -> None:
    late: dict[str, Any] = {"phase2_start": 0.5, "phase3_start": 0.75}
    phases = [counted("dctc", step=step, rounds=8, **late) for step in (3, 4, 6)]
    assert phases == [counted("dctc", step=step, phase2_start=1, phase3_start=2) for step in (0, 1, 2)]
    method = build_method("dctc", NetworkSpec(BANDS, CLASSES, width=4), late)
    method.length = Length(rounds=8, epoch=1)
    assert method.changes() == [4, 6]
    method = build_method("dst_cbc", NetworkSpec(BANDS, CLASSES, width=4), {"start": 0.25, "stages": 3})
    method.length = Length(rounds=8, epoch=1)
    assert method.changes() == [2], "its later stages have the same work"
    found = [counted("dst_cbc", start=0.25, step=step, rounds=8) for step in (1, 2, 3)]
    assert found[0] < found[1] == found[2]


def test_fused_students_share_the_encoder() -> None:
    width, size = 8, 32
    e, d = encoder(width, size), decoder(width, size)
    teacher = e + d + attention(width)
    whole = trained(teacher, width, size) + teacher + e + 2 * d  # phase 1, and who labels in phases 2 and 3
    whole += 2 * (trained(e, width, size) + 2 * 3 * d)  # one encoder pass a phase, both decoders after it
    assert counted("dctc", width, size, update="fused") == whole


def test_the_papers_size_takes_as_much_as_the_design_says() -> None:
    width, size, batch = 64, 512, 4
    unet = batch * (encoder(width, size) + decoder(width, size))
    measured = counted("dctc", width, size, (batch, batch))
    assert measured / unet == pytest.approx(17.5, rel=0.01)  # 17.635: 2.998 + 6.995 + 7.642


@pytest.mark.parametrize(
    ("name", "network"),
    [(name, "unet") for name in method_names()]
    + [("supervised", network) for network in network_names() if network != "timm_unet"],
)
def test_every_method_and_network_counts_and_is_linear_in_the_batch(name: str, network: str) -> None:
    spec = NetworkSpec(BANDS, CLASSES, name=network, width=4)
    one, three = (round_flops(name, spec, {}, n, n, 32) for n in (1, 3))
    assert three == 3 * one > 0


def gated_decoder(width: int, size: int) -> int:
    """Of an Attention U-Net: up by a 3x3 convolution, a gate of three 1x1 ones, two 3x3 ones; a 1x1 head."""
    total = convolution(width, CLASSES, 1, size)
    for stage in range(4):
        outputs, side = width * 2**stage, size // 2**stage
        inner = outputs // 2
        total += 2 * convolution(outputs, inner, 1, side) + convolution(inner, 1, 1, side)
        total += 2 * convolution(2 * outputs, outputs, 3, side) + convolution(outputs, outputs, 3, side)
    return total


def residual(depth: int, inputs: int, inner: int, outputs: int, size: int) -> int:
    """A residual U-block: all of its convolutions are 3x3. RSU-L has L - 1 scales, RSU-4F (depth 0) one."""
    levels = depth or 4
    sides = [size // 2 ** (min(level, levels - 2) if depth else 0) for level in range(levels)]
    total = convolution(inputs, outputs, 3, size) + convolution(outputs, inner, 3, size)
    total += sum(convolution(inner, inner, 3, side) for side in sides[1:])
    total += sum(convolution(2 * inner, inner, 3, side) for side in sides[1:-1])
    return total + convolution(2 * inner, outputs, 3, size)


def u2net(size: int, outer: list[int], inner: list[int], up: list[int], up_inner: list[int]) -> int:
    """Forward of one image; ``outer`` and ``inner`` channels down, the same up, coarsest first."""
    depths, sides = [7, 6, 5, 4, 0, 0], [size // 2**stage for stage in range(6)]
    total = sum(residual(*stage) for stage in zip(depths, [BANDS, *outer], inner, outer, sides, strict=False))
    below = [outer[-1], *up]
    for stage, depth in enumerate([0, 4, 5, 6, 7]):
        scale = 4 - stage
        total += residual(depth, below[stage] + outer[scale], up_inner[stage], up[stage], sides[scale])
    total += sum(convolution(c, CLASSES, 3, side) for c, side in zip(below, reversed(sides), strict=True))
    return total + convolution(6 * CLASSES, CLASSES, 1, size)


def test_the_other_networks_by_hand() -> None:
    """At a 64th of the authors' channels times 16, where every width is whole; deep supervision costs what it costs."""
    size, width = 64, 16
    forwards = {
        "attention_unet": (encoder(width, size) + gated_decoder(width, size), width),
        "u2net": (u2net(size, [16, 32, 64, 128, 128, 128], [8, 8, 16, 32, 64, 64], [128, 64, 32, 16, 16],
                        [64, 32, 16, 8, 4]), 16),
        "u2net_small": (u2net(size, [16] * 6, [4] * 6, [16] * 5, [4] * 5), 16),
    }  # fmt: skip
    for name, (forward, first) in forwards.items():
        found = round_flops("supervised", NetworkSpec(BANDS, CLASSES, name, width), {}, 2, 0, size)
        assert found == 2 * trained(forward, first, size), name


def test_norms_cost_nothing_and_sync_is_counted_without_a_gpu() -> None:
    values = {n: round_flops("supervised", NetworkSpec(BANDS, CLASSES, width=4, norm=n), {}, 1, 1, 32)
              for n in ("batch", "sync", "group")}  # fmt: skip
    assert len(set(values.values())) == 1, values


def test_counting_leaves_the_generator_and_the_default_device_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    counted("dctc")
    assert torch.equal(torch.rand(4), expected), "a run would begin with other weights"


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA H100 80GB HBM3", (67, 494.7, 989.4, 989.4)),
        ("NVIDIA H100 PCIe", (51, 378, 756, 756)),
        ("NVIDIA H100 NVL", (60, 417.5, 835.5, 835.5)),
        ("NVIDIA H200", (67, 494.7, 989.4, 989.4)),
        ("NVIDIA B200", (75, 1125, 2250, 2250)),
        ("NVIDIA A100-SXM4-80GB", (19.5, 156, 312, 312)),
        ("A100-PCIE-40GB", (19.5, 156, 312, 312)),
        ("NVIDIA A100 80GB PCIe", (19.5, 156, 312, 312)),
        ("NVIDIA A10", (31.2, 62.5, 125, 125)),
        ("NVIDIA A40", (37.4, 74.8, 149.7, 149.7)),
        ("NVIDIA RTX A6000", (38.7, 77.4, 154.8, 154.8)),
        ("NVIDIA L4", (30.3, 60, 121, 121)),
        ("NVIDIA L40S", (91.6, 183, 362, 362)),
        ("NVIDIA GeForce RTX 3090", (35.6, 35.6, 71, 71)),
        ("NVIDIA GeForce RTX 4090", (82.6, 82.6, 165.2, 165.2)),
        ("Tesla V100-SXM2-32GB", (15.7, None, None, 125)),
        ("Tesla V100-PCIE-16GB", (14, None, None, 112)),
        ("Tesla T4", (8.1, None, None, 65)),
    ],
)
def test_peaks(name: str, peaks: tuple[float | None, ...]) -> None:
    found = [peak_flops(name, "fp32"), peak_flops(name, "tf32"), peak_flops(name, "bf16"), peak_flops(name, "fp16")]
    assert found == [None if peak is None else pytest.approx(peak * 1e12) for peak in peaks]


@pytest.mark.parametrize(
    "name",
    ["", "cpu", "x86_64", "NVIDIA A10G", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU",
     "NVIDIA L40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA GB200",
     "Tesla P100"],
)  # fmt: skip
def test_a_relative_of_a_known_device_has_no_peak(name: str) -> None:
    assert peak_flops(name, "fp16") is None
