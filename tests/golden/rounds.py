"""Rounds of a tiny method through the engine, as the trainer makes them, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.engine.parallel import Parallel
from dctc.engine.precision import Precision
from dctc.engine.trainer import Trainer
from dctc.engine.update import Losses, OptimizerSpec, Updater
from dctc.methods import Batch, Method, build_method
from dctc.networks import NetworkSpec

BANDS, CLASSES, WIDTH, IGNORE = 3, 4, 4, 255
TERMS = ("teacher", "teacher_to_s1", "teacher_to_s2", "s2_to_s1", "s1_to_s2")
ADAM = OptimizerSpec()  # the paper's: Adam(1e-3, betas .9/.999, eps 1e-8, no decay)
SGD = OptimizerSpec(name="sgd", lr=0.01, momentum=0.9)


def built(
    name: str = "dctc", norm: str = "batch", dtype: torch.dtype = torch.float32, network: str = "unet", **options: Any
) -> Method:
    """A method with the same weights at each call."""
    torch.manual_seed(7)
    method = build_method(name, NetworkSpec(BANDS, CLASSES, network, WIDTH, norm), options)
    for module in method.parts.values():
        module.to(dtype)
    return method


def updater(method: Method, spec: OptimizerSpec, precision: str = "fp32") -> Updater:
    """The engine's updater of one process."""
    parallel = Parallel()
    return Updater(method.parts, spec, parallel, Precision(precision, parallel.device))


def run_round(
    method: Method,
    run: Any,
    labelled: Sequence[Batch],
    unlabelled: Sequence[Batch],
    step: int,
    all_unlabelled: Sequence[Batch] = (),
) -> list[Losses]:
    """One round as the trainer makes it. ``run`` takes an update and returns its losses; a survey is over
    ``all_unlabelled``."""
    precision = Precision("fp32", torch.device("cpu"))
    watch = SimpleNamespace(survey=lambda wanted: torch.stack([wanted.of(batch) for batch in all_unlabelled]).sum(0))
    trainer = SimpleNamespace(method=method, updater=run, precision=precision, watch=watch, parallel=Parallel())
    return Trainer.round(cast(Trainer, trainer), labelled, unlabelled, step)


def batches(step: int, count: int = 2, tile: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Batch, Batch]:
    """The labelled and the unlabelled batch of a round, with ignored labels and pixels without data."""
    generator = torch.Generator().manual_seed(1000 + step)

    def batch(labelled: bool) -> Batch:
        labels = torch.randint(0, CLASSES, (count, tile // 4, tile // 4), generator=generator)
        labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        images = torch.randn(count, BANDS, tile, tile, generator=generator) + labels[:, None] * 0.7
        valid = torch.rand(count, tile, tile, generator=generator) > 0.2
        images = torch.where(valid[:, None], images, 0.0).to(dtype)
        return Batch(images, valid, torch.where(valid, labels, IGNORE) if labelled else None)

    return batch(True), batch(False)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches of a batch; partners and boxes are left out."""
    labels: Sequence[Tensor | None] = [None] * parts if batch.labels is None else batch.labels.chunk(parts)
    pieces = zip(batch.images.chunk(parts), batch.valid.chunk(parts), labels, strict=True)
    return [
        Batch(images, valid, y, [v.chunk(parts)[k] for v in batch.views], [v.chunk(parts)[k] for v in batch.view_valid])
        for k, (images, valid, y) in enumerate(pieces)
    ]


def by_term(losses: Sequence[Losses]) -> dict[str, float]:
    """Loss term -> value of one round."""
    return {term: float(v) for update in losses for term, v in zip(update.terms, update.shares, strict=True)}


def weights(method: Method) -> Tensor:
    """All parameters in one vector, copied."""
    return torch.cat([p.detach().flatten() for part in method.parts.values() for p in part.parameters()])


def balanced(counts: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """f^-power, mean 1 over the pixels, at most 10."""
    if not power:
        return np.ones(CLASSES)
    f = counts / counts.sum()
    raw = f**-power
    found: NDArray[np.float64] = np.minimum(raw / (f * raw).sum(), 10)
    return found
