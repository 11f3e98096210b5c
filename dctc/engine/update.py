"""One exact update: the gradient of the global-batch objective, whatever the ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from dctc.engine.parallel import Parallel
from dctc.engine.precision import Precision
from dctc.methods.base import Update


@dataclass(frozen=True)
class OptimizerSpec:
    """Settings of the one optimizer of each part; ``clip`` is the largest gradient norm of a part, None for none."""

    name: str = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = None

    def build(self, module: nn.Module) -> Optimizer:
        """The optimizer of one part's parameters."""
        parameters = list(module.parameters())
        fused = parameters[0].is_cuda
        if self.name == "sgd":
            return SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=fused)
        kind = AdamW if self.name == "adamw" else Adam
        return kind(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=fused)


@dataclass(frozen=True)
class Losses:
    """What an update saw on this rank: ``shares`` [terms] sum over the ranks to the global mean losses."""

    terms: tuple[str, ...]
    shares: Tensor


class Updater:
    """Runs updates on wrapped parts, each with its own optimizer.

    Args:
        parts: name -> wrapped module.
        spec: optimizer settings, the same for every part.
    """

    def __init__(
        self, parts: Mapping[str, nn.Module], spec: OptimizerSpec, parallel: Parallel, precision: Precision
    ) -> None:
        self.parts = parts
        self.spec = spec
        self.parallel = parallel
        self.precision = precision
        self.optimizers = {name: spec.build(module) for name, module in parts.items()}

    def set_rate(self, factor: float) -> float:
        """Set every part's learning rate to ``factor`` times the base rate; returns it."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.spec.lr * factor
        return self.spec.lr * factor

    def __call__(self, update: Update) -> Losses:
        """Step ``update.parts`` once on the global batch; no other part, moment or buffer changes.

        The local sum is scaled by ``world / (global count)``, because DDP averages gradients over the ranks. A batch
        without a single counted pixel has loss 0.
        """
        modules = [self.parts[name] for name in update.parts]
        optimizers = [self.optimizers[name] for name in update.parts]
        totals = self.parallel.sum(torch.stack(list(update.counts)).sum(dim=0)).clamp(min=1)
        scale = self.parallel.world / totals
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        seen = self._accumulate(update, modules, scale)
        for module, optimizer in zip(modules, optimizers, strict=True):
            if self.spec.clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), self.spec.clip)
            _step(optimizer, update.rate)
        self.parallel.average_buffers(modules)
        return Losses(update.terms, seen / totals)

    def _accumulate(self, update: Update, modules: Sequence[nn.Module], scale: Tensor) -> Tensor:
        """Forward and backward of every micro-batch; returns the summed losses [terms], detached."""
        seen = torch.zeros_like(scale)
        last = len(update.counts) - 1
        for micro in range(len(update.counts)):
            local = nullcontext() if micro == last else self.parallel.gradients_stay_local(modules)
            with local:
                with self.precision.autocast():
                    sums = update.sums(micro)
                torch.autograd.backward((sums * scale).sum())
            seen += sums.detach()
        return seen


def _step(optimizer: Optimizer, rate: float) -> None:
    """One step at ``rate`` times the learning rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= rate
    optimizer.step()
    for group, before in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = before
