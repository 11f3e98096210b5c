"""Which pseudo labels are trusted, what a class weighs, and features that are dropped.

A pixel that is not trusted is ignored in the sum of its loss but counts in the number it is divided by, as in FixMatch:
labels that are doubted altogether move little.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dctc.methods.base import IGNORE, Total
from dctc.methods.losses import pseudo_label

Memory = dict[str, Any]
MOMENTUM = 0.99  # of running means over rounds
BINS = 1024  # of the entropy
HEAVIEST = 10.0  # weight of a class

Threshold = Literal["none", "fixed", "adaptive", "entropy"]


@dataclass(frozen=True)
class Trust:
    """From predictions to the labels that others learn.

    - ``fixed``: the pixels whose likeliest class has at least probability ``confidence`` (FixMatch, UniMatch).
    - ``adaptive``: a threshold for each class, ``tau m_c / max_c m_c``: tau is the running mean over the rounds of the
      likeliest class' probability, m_c that of class c's probability (FreeMatch's self-adaptive thresholds). Classes
      that the net seldom sees need less.
    - ``entropy``: all but the share ``drop (1 - t)`` of the pixels with the highest entropy, t the part of the run that
      is done (U2PL).

    Attributes:
        soft: labels are the probabilities, not the likeliest class.
    """

    kind: Threshold = "none"
    confidence: float = 0.95
    drop: float = 0.2
    soft: bool = False

    def labels(
        self, who: str, logits: Sequence[Tensor], valid: Sequence[Tensor], memory: Memory, done: float
    ) -> Generator[Total, Any, list[Tensor]]:
        """A target for each micro-batch, ignored where the image has no data or the prediction is not trusted.

        Thresholds are of the global batch: the same on any number of ranks and micro-batches.

        Args:
            who: whose predictions these are; each net has its own running means.
            logits: float [B,K,H,W], of each micro-batch.
            valid: bool [B,H,W].
            memory: of the method.
            done: part of the run that is done, in [0, 1].
        """
        if self.kind == "none":
            return [pseudo_label(z, v, self.soft) for z, v in zip(logits, valid, strict=True)]
        probabilities = [torch.softmax(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1) for z in logits]
        if self.kind == "fixed":
            sure = [p.amax(dim=1) >= self.confidence for p in probabilities]
        elif self.kind == "adaptive":
            sure = yield from self._adaptive(who, probabilities, valid, memory)
        else:
            sure = yield from self._by_entropy(probabilities, valid, self.drop * (1 - done))
        return [pseudo_label(z, v & s, self.soft) for z, v, s in zip(logits, valid, sure, strict=True)]

    def _adaptive(
        self, who: str, probabilities: Sequence[Tensor], valid: Sequence[Tensor], memory: Memory
    ) -> Generator[Total, Any, list[Tensor]]:
        classes = probabilities[0].shape[1]
        sums = torch.zeros(classes + 2, dtype=torch.float64, device=probabilities[0].device)
        for p, v in zip(probabilities, valid, strict=True):
            seen = torch.where(v[:, None], p, 0.0)
            means = seen.sum(dim=(0, 2, 3), dtype=torch.float64)
            sums += torch.cat([means, torch.stack([seen.amax(dim=1).sum(dtype=torch.float64), v.sum().double()])])
        total = yield Total(sums)
        means_of: dict[str, list[float]] = memory.setdefault("means", {})
        running = means_of.get(who, [1 / classes] * (classes + 1))
        if total is not None:
            *numbers, count = total.tolist()
            if count and all(map(math.isfinite, numbers)):  # fp16 may overflow for a round, whose update is skipped
                running = [
                    MOMENTUM * old + (1 - MOMENTUM) * new / count for old, new in zip(running, numbers, strict=True)
                ]
            means_of[who] = running
        *of_class, overall = running
        least = torch.tensor(
            [overall * mean / max(of_class) for mean in of_class], dtype=probabilities[0].dtype, device=sums.device
        )
        tops = [p.max(dim=1) for p in probabilities]
        return [top.values >= least[top.indices] for top in tops]

    def _by_entropy(
        self, probabilities: Sequence[Tensor], valid: Sequence[Tensor], dropped: float
    ) -> Generator[Total, Any, list[Tensor]]:
        """A bin of entropies is kept or dropped whole: at most ``dropped`` of the pixels go."""
        scale = BINS / math.log(probabilities[0].shape[1])
        bins = [(-torch.xlogy(p, p).sum(dim=1) * scale).long().clamp(0, BINS - 1) for p in probabilities]
        counts = torch.zeros(BINS, dtype=torch.int64, device=bins[0].device)
        for b, v in zip(bins, valid, strict=True):
            counts.scatter_add_(0, b.flatten(), v.flatten().long())
        total = yield Total(counts)
        if total is None:
            return list(valid)
        below = total.cumsum(0)
        last = (below < (1 - dropped) * below[-1].double()).sum()
        return [b <= last for b in bins]


def class_weights(
    labels: Sequence[Tensor], classes: int, power: float, memory: Memory
) -> Generator[Total, Any, Tensor | None]:
    """Weights float32 [K] that rise as a class is rare: ``f_c^-power``, scaled to mean 1 over the labelled pixels.

    None where ``power`` is 0: nothing is counted then.

    f_c is the class' share of all labelled pixels so far; a weight is at most :data:`HEAVIEST`, also where a class has
    not been seen.

    Args:
        labels: int64 [B,H,W] with 255 = ignore, of each micro-batch.
        memory: of the method.
    """
    if not power:
        return None
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=labels[0].device)
    for y in labels:
        counts.scatter_add_(0, torch.where(y == IGNORE, classes, y).flatten(), torch.ones_like(y).flatten())
    total = yield Total(counts[:classes])
    if total is not None:
        seen = memory.get("pixels", [0] * classes)
        memory["pixels"] = [old + new for old, new in zip(seen, total.tolist(), strict=True)]
    weights = weights_of(memory.get("pixels", [1] * classes), power)
    return torch.tensor(weights, dtype=torch.float32, device=labels[0].device)


def must_be_a_power(class_balance: float) -> None:
    """Raises :class:`ValueError` for what cannot be the ``power`` of :func:`class_weights`."""
    if not 0 <= class_balance <= 1:
        raise ValueError(f"class_balance must lie in [0, 1], got {class_balance}")


def weights_of(pixels: Sequence[int], power: float) -> list[float]:
    """See :func:`class_weights`; 1 for all where no pixel has been seen."""
    if not (total := sum(pixels)):
        return [1.0] * len(pixels)
    shares = [count / total for count in pixels]
    mean = sum(share ** (1 - power) for share in shares if share)
    return [min(share**-power / mean, HEAVIEST) if share else HEAVIEST for share in shares]


def drop_channels(features: Sequence[Tensor], keys: Sequence[int], share: float) -> list[Tensor]:
    """Feature maps with a share of each sample's channels at 0 and the others scaled up (UniMatch's perturbation).

    Args:
        features: float [B,C_i,H_i,W_i], of each scale.
        keys: of each sample; its channels are drawn from it alone, whatever else is in the batch.
        share: probability that a channel goes, in [0, 1).
    """
    widths = [f.shape[1] for f in features]
    draws = [random.Random(key) for key in keys]
    kept = torch.tensor([[(draw.random() >= share) / (1 - share) for _ in range(sum(widths))] for draw in draws])
    masks = torch.split(kept, widths, dim=1)
    return [
        f * mask.to(f.device, f.dtype, non_blocking=True)[:, :, None, None]
        for f, mask in zip(features, masks, strict=True)
    ]


def rounds_of(value: float, rounds: int) -> int:
    """A number of rounds; below 1 a share of the run's ``rounds``."""
    return round(value * rounds) if value < 1 else int(value)
