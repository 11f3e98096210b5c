"""The one optimizer of each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer


@dataclass(frozen=True)
class OptimizerSpec:
    """Settings of the one optimizer of each part.

    Attributes:
        clip: the largest gradient norm of a part, None for none.
        nonfinite: what to do with an update whose loss or gradient is not finite. ``stop`` looks at log steps and
            before checkpoints, and costs nothing; ``skip`` leaves weights, moments and buffers as they were, and waits
            for the device in each update.
    """

    name: str = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = None
    nonfinite: Literal["stop", "skip"] = "stop"

    def build(self, module: nn.Module) -> Optimizer:
        """The optimizer of one part's parameters, with fused kernels on a GPU."""
        parameters = list(module.parameters())
        fused = parameters[0].is_cuda
        if self.name == "sgd":
            fused = fused and not isinstance(parameters[0], DTensor)  # torch shards no fused SGD
            return SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=fused)
        kind = AdamW if self.name == "adamw" else Adam
        return kind(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=fused)


def step_at(optimizer: Optimizer, rate: float) -> None:
    """One step at ``rate`` times the learning rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= rate
    optimizer.step()
    for group, before in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = before
