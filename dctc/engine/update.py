"""One exact update: the gradient of the global-batch objective, whatever the ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dctc.engine.clock import ForwardClock
from dctc.engine.optimizer import OptimizerSpec
from dctc.engine.parallel import Parallel
from dctc.engine.parts import Part
from dctc.engine.precision import Precision
from dctc.methods.base import Follow, Restart, Update

__all__ = ["Losses", "OptimizerSpec", "Updater"]


@dataclass(frozen=True)
class Losses:
    """What an update saw.

    Attributes:
        terms: names of the loss terms.
        shares: float32 [terms] of this rank; they sum over the ranks to the global mean losses.
        norms: part -> gradient norm before clipping, float32 [], where it was computed.
        skipped: the update was left out because something was not finite.
    """

    terms: tuple[str, ...]
    shares: Tensor
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: bool = False


class Updater:
    """Runs updates on parts, each with its own wrapper and optimizer.

    Args:
        modules: name -> plain module. Put :attr:`modules` into the method afterwards: the wrapped ones.
        spec: optimizer settings, the same for every part.
        offload: see :class:`dctc.engine.zero.ZeroPart`.

    Attributes:
        parts: name -> part.
        measure: compute gradient norms and time forward passes in the next updates, also where nothing needs them.
        clock: of these forward passes.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        spec: OptimizerSpec,
        parallel: Parallel,
        precision: Precision,
        offload: bool = False,
    ) -> None:
        self.spec = spec
        self.parallel = parallel
        self.precision = precision
        self.parts: dict[str, Part] = {
            name: parallel.part(module, spec, precision, offload) for name, module in modules.items()
        }
        self.measure = False
        self.clock = ForwardClock(parallel.device)
        self._zero = parallel.strategy.startswith("zero")

    @property
    def skips(self) -> bool:
        """Whether updates that are not finite are left out."""
        return self.spec.nonfinite == "skip" or self.precision.loss_scale is not None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Name -> wrapped module."""
        return {name: part.module for name, part in self.parts.items()}

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Name -> optimizer."""
        return {name: part.optimizer for name, part in self.parts.items()}

    def set_rate(self, factor: float) -> float:
        """Set every part's learning rate to ``factor`` times the base rate; returns it."""
        for part in self.parts.values():
            for group in part.optimizer.param_groups:
                group["lr"] = self.spec.lr * factor
        return self.spec.lr * factor

    def __call__(self, update: Update) -> Losses:
        """Step ``update.parts`` once on the global batch; no other part, moment or buffer changes.

        The local sum is scaled by ``world / (global count)``, because every strategy averages gradients over the ranks.
        A batch without a single counted pixel has loss 0.
        """
        parts = {name: self.parts[name] for name in update.parts}
        buffers = self._buffers(parts) if self.skips else []
        totals = self.parallel.sum(torch.stack(list(update.counts)).sum(dim=0)).clamp(min=1)
        scale = self.parallel.world / totals
        for part in parts.values():
            part.zero_grad()
        seen = self._accumulate(update, list(parts.values()), scale)
        norms = self._norms(parts) if self._needs_norms and not self._zero else {}
        finite = self._is_finite(norms)
        if finite:
            for name, part in parts.items():
                if self.spec.clip is not None and not self._zero:
                    part.scale_gradient((self.spec.clip / (norms[name] + 1e-6)).clamp(max=1.0))
                part.step(update.rate)
            self.parallel.average_buffers(part.inner for part in parts.values())
        for buffer, before in buffers if not finite else []:
            buffer.copy_(before)
        if self._needs_norms and self._zero:
            norms = self._norms(parts)
        return Losses(update.terms, seen / totals, norms, skipped=not finite)

    def change(self, step: Follow | Restart) -> None:
        """A step without a loss."""
        if isinstance(step, Follow):
            self.parts[step.part].follow([self.parts[name] for name in step.leaders], step.keep)
        else:
            for name in step.parts:
                self.parts[name].restart()

    @property
    def _needs_norms(self) -> bool:
        return self.measure or self.skips or self.spec.clip is not None

    def _accumulate(self, update: Update, parts: Sequence[Part], scale: Tensor) -> Tensor:
        """Forward and backward of every micro-batch; returns the summed losses [terms], detached."""
        seen = torch.zeros_like(scale)
        if self.precision.loss_scale is not None:
            scale = scale * self.precision.loss_scale.value
        last = len(update.counts) - 1
        for micro in range(len(update.counts)):
            with ExitStack() as stack:
                for part in parts:
                    stack.enter_context(part.micro_batch(micro == last))
                timed = self.clock.running() if self.measure else nullcontext()
                with timed, self.precision.autocast():
                    sums = update.sums(micro)
                torch.autograd.backward((sums * scale).sum())
            seen += sums.detach()
        return seen

    def _norms(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """Gradient norms, after the loss scale of fp16 was taken out of the gradients."""
        if self.precision.loss_scale is not None:
            for part in parts.values():
                part.scale_gradient(1.0 / self.precision.loss_scale.value)
        return {name: part.gradient_norm() for name, part in parts.items()}

    def _is_finite(self, norms: Mapping[str, Tensor]) -> bool:
        """Whether the update may be made. The norms are global, so every rank decides alike."""
        if not self.skips:
            return True
        finite = bool(torch.isfinite(torch.stack(list(norms.values()))).all())
        if self.precision.loss_scale is not None:
            self.precision.loss_scale.update(finite)
        return finite

    def _buffers(self, parts: Mapping[str, Part]) -> list[tuple[Tensor, Tensor]]:
        """The buffers of the parts, each with a copy of it."""
        return [(buffer, buffer.clone()) for part in parts.values() for buffer in part.inner.buffers()]
