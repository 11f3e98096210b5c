"""Floating-point operations of a training round, and what a device could do at most: together the MFU.

A multiplication and an addition count as two. As is usual for model FLOPs, only matrix products and convolutions are
counted (normalisation, activations, losses and optimizers are memory-bound), and nothing that would be computed twice
to save memory: MFU, not HFU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dctc.methods import Batch, Method, build_method
from dctc.methods.base import Length, Needs, Update
from dctc.networks import NetworkSpec

FAR_ALONG = 10**9  # a round after every start and ramp of a phase
Dtype = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class RunFlops:
    """Floating-point operations of the rounds of a run, over all ranks.

    Attributes:
        stages: first round of a stage, from 0 and ascending -> operations of each of its rounds.
        rounds: of the run.
    """

    stages: Mapping[int, float]
    rounds: int

    def at(self, step: int) -> float:
        """Of this round."""
        return self.stages[max(first for first in self.stages if first <= step)]

    @property
    def mean(self) -> float:
        """Of a round, over the run."""
        ends = [*list(self.stages)[1:], self.rounds]
        spans = zip(self.stages.items(), ends, strict=True)
        return sum(flops * (end - first) for (first, flops), end in spans) / self.rounds


def round_flops(
    method_name: str,
    spec: NetworkSpec,
    options: Mapping[str, Any],
    batch_labelled: int,
    batch_unlabelled: int,
    tile: int,
    step: int = FAR_ALONG,
    rounds: int | None = None,
) -> float:
    """Operations of one round, pseudo labels included; nothing is computed.

    Fake tensors are the meta device in a CPU's clothes: autocast, which the losses switch off, does not know "meta".
    Weights are made in earnest and let go, because the makers of many backbones read values back from tensors. A method
    that does so in a round (``item``) cannot be counted; torch says so.

    Args:
        options: of the method, as in its YAML.
        batch_labelled, batch_unlabelled: tiles of the round, over all ranks and micro-batches.
        tile: height and width in pixels.
        step: the round that is counted, from 0; a method may begin with fewer phases.
        rounds: of the run, for starts that are a share of it; ``step`` where it is not given.
    """
    # No norm counts; sync refuses CPUs and batch a map of a single pixel, but a backbone keeps its own.
    spec = replace(spec, norm="batch" if spec.backbone else "group")
    with torch.random.fork_rng(devices=[]):
        method = build_method(method_name, spec, options)
    with FakeTensorMode() as mode:
        for module in method.parts.values():
            _without_norms(module)
            module._apply(mode.from_tensor)  # type: ignore[no-untyped-call]  # torch has no types here
        method.length = Length(rounds=step if rounds is None else rounds, epoch=1)
        labelled = _batch(spec, batch_labelled, tile, method.labelled_needs, labels=True)
        unlabelled = _batch(spec, batch_unlabelled, tile, method.unlabelled_needs, labels=False)
        with FlopCounterMode(display=False) as counter:
            for further in range(method.cycle):
                _run(method, labelled, unlabelled, step + further)
    return float(counter.get_total_flops()) / method.cycle


def _without_norms(module: nn.Module) -> None:
    """They do not count, and take a third of the time."""
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm2d, nn.GroupNorm):  # a backbone's may be more than a norm
            setattr(module, name, nn.Identity())
        else:
            _without_norms(child)


def _batch(spec: NetworkSpec, count: int, tile: int, needs: Needs, labels: bool) -> Batch:
    shape = (count, tile, tile)
    classes = torch.zeros(shape, dtype=torch.int64) if labels else None
    images, valid = torch.zeros(count, spec.bands, tile, tile), torch.ones(shape, dtype=torch.bool)
    boxes = None if needs.boxes is None else torch.zeros(max(1, needs.views), *shape, dtype=torch.bool)
    return Batch(
        images, valid, classes, [images] * needs.views, [valid] * needs.views,
        boxes, None if boxes is None else torch.arange(count), [0] * count,
    )  # fmt: skip


def _run(method: Method, labelled: Batch, unlabelled: Batch, step: int) -> None:
    """Forward and backward of each update as the engine runs them, without a step.

    A survey is left out: it is made in a few rounds of a run, and the method sees none of its result.
    """
    for part in method.round([labelled], [unlabelled], step):
        if isinstance(part, Update):
            for micro in range(len(part.counts)):
                torch.autograd.backward(part.sums(micro).sum())


TERA = 1e12
# Dense peaks of tensor cores in TFLOP/s with float32 accumulation, as PyTorch multiplies, and of float32 without TF32;
# None where the device lacks the format. The name, less its maker and line, as torch.cuda.get_device_name has it.
# Where NVIDIA prints figures "with sparsity" alone, as from Hopper on, half of them stand here.
_PEAKS: tuple[tuple[str, float, float | None, float | None, float], ...] = (
    # name, fp32, tf32, bf16, fp16
    (r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe", 19.5, 156, 312, 312),  # A100 data sheet
    (r"H100 PCIe", 51, 378, 756, 756),  # H100 data sheet of 2022: 756, 1513, 1513 sparse
    (r"H100 NVL", 60, 417.5, 835.5, 835.5),  # H100 data sheet of 2024, one card: 835, 1671, 1671 sparse
    (r"H100 \d+GB HBM3", 67, 494.7, 989.4, 989.4),  # H100 (SXM) data sheet and Hopper white paper: 989, 1979 sparse
    (r"H200 NVL", 60, 417.5, 835.5, 835.5),  # H200 data sheet: 835, 1671, 1671 sparse
    (r"H200", 67, 494.7, 989.4, 989.4),  # H200 (SXM) data sheet: 989, 1979, 1979 sparse
    (r"B200", 75, 1125, 2250, 2250),  # HGX B200 page, an eighth of 600, and of 18, 36, 36 PFLOPS sparse
    (r"L4", 30.3, 60, 121, 121),  # L4 data sheet: 120, 242, 242 sparse
    (r"L40S", 91.6, 183, 362, 362),  # L40S data sheet
    (r"A10", 31.2, 62.5, 125, 125),  # A10 data sheet
    (r"A40", 37.4, 74.8, 149.7, 149.7),  # A40 data sheet
    (r"RTX A6000", 38.7, 77.4, 154.8, 154.8),  # GA102 white paper, RTX A6000; its data sheet: 309.7 sparse
    (r"RTX 3090", 35.6, 35.6, 71, 71),  # GA102 white paper, appendix A
    (r"RTX 4090", 82.6, 82.6, 165.2, 165.2),  # Ada white paper, appendix A
    (r"V100-SXM2-(16|32)GB", 15.7, None, None, 125),  # V100 data sheet
    (r"V100-PCIE-(16|32)GB", 14, None, None, 112),  # V100 data sheet
    (r"V100S-PCIE-32GB", 16.4, None, None, 130),  # V100 data sheet
    (r"T4", 8.1, None, None, 65),  # T4 data sheet
)


def peak_flops(device_name: str, dtype: Dtype) -> float | None:
    """The dense peak of a device in FLOP/s by the name that torch gives it; None when it is not known.

    A slice of a GPU (MIG) and a relative of a listed one (A10G, 3090 Ti, a laptop's 4090) are not known: their peaks
    are others.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )*", "", device_name)
    for pattern, fp32, tf32, bf16, fp16 in _PEAKS:
        if re.fullmatch(pattern, name):
            peak = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}[dtype]
            return None if peak is None else peak * TERA
    return None
