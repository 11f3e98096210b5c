"""Cross pseudo supervision: two nets of one kind that label each other (Chen et al., 2021).

One round, one step of both nets on the sum: ``CE(z1, y) + CE(z2, y)`` on labelled tiles and
``w (CE(z1, argmax z2) + CE(z2, argmax z1))`` on labelled and unlabelled ones; no threshold, no ramp. With CutMix the
cross terms are on the unlabelled tiles alone: each net labels them as they are, and learns from the other's labels on
tiles that are mixed of two different images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dctc.methods.base import Batch, Boxes, Method, Needs, Round, Update, inference
from dctc.methods.losses import cross_entropy_sum, mean_prediction, pixel_count, pseudo_label
from dctc.networks import NetworkSpec, build_network

NETS = ("s1", "s2")


@dataclass(frozen=True)
class Options:
    """Switches.

    Attributes:
        weight: w of the cross terms; the authors take 1.5 without CutMix and 1 with it.
        cutmix: mix unlabelled tiles: three boxes that cover a quarter to a half of each.
        loss: as in :mod:`dctc.methods.dctc`.
    """

    weight: float = 1.5
    cutmix: bool = False
    loss: Literal["multiclass", "binary"] = "multiclass"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")


class CrossPseudoSupervision(Method):
    """Parts ``s1`` and ``s2``: whole networks with independent initial weights."""

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        super().__init__({name: build_network(spec) for name in NETS})
        self.options = options
        if options.cutmix:
            self.unlabelled_needs = Needs(boxes=Boxes(3, 0.25, 0.5))

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """One update of both nets."""
        labels = [batch.required_labels() for batch in labelled]
        cross = self._mixed if self.options.cutmix else self._plain

        def sums(micro: int) -> Tensor:
            known = [self.parts[name](labelled[micro].images) for name in NETS]
            supervised = [cross_entropy_sum(z, labels[micro], kind=self.options.loss) for z in known]
            taught = cross(known, labelled[micro], unlabelled[micro])
            return torch.stack([*supervised, *(self.options.weight * loss for loss in taught)])

        def count(y: Tensor, known: Batch, unknown: Batch) -> Tensor:
            seen = (
                unknown.mixed(unknown.valid).sum() if self.options.cutmix else known.valid.sum() + unknown.valid.sum()
            )
            return torch.stack([pixel_count(y)] * 2 + [seen.sum().float()] * 2)

        counts = [count(*micro) for micro in zip(labels, labelled, unlabelled, strict=True)]
        yield Update(("s1", "s2", "s2_to_s1", "s1_to_s2"), NETS, counts, sums)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of both nets and of their mean."""
        s1, s2 = (self.parts[name](images) for name in NETS)
        return {"s1": s1, "s2": s2, "mean": mean_prediction(s1, s2)}

    def _plain(self, known: Sequence[Tensor], labelled: Batch, unlabelled: Batch) -> list[Tensor]:
        """The cross terms of s1 and of s2 on all tiles; ``known``: both nets' logits of the labelled ones."""
        unknown = [self.parts[name](unlabelled.images) for name in NETS]
        losses = []
        for mine, other in ((0, 1), (1, 0)):
            pairs = ((known, labelled), (unknown, unlabelled))
            targets = [pseudo_label(logits[other].detach(), batch.valid) for logits, batch in pairs]
            terms = [self._loss(logits[mine], y) for (logits, _), y in zip(pairs, targets, strict=True)]
            losses.append(terms[0] + terms[1])
        return losses

    def _mixed(self, known: Sequence[Tensor], labelled: Batch, unlabelled: Batch) -> list[Tensor]:
        """The cross terms of s1 and of s2 on mixed unlabelled tiles."""
        modules = [self.parts[name] for name in NETS]
        with inference(*modules):
            said = [pseudo_label(module(unlabelled.images), unlabelled.valid) for module in modules]
        y1, y2 = (unlabelled.mixed(y) for y in said)
        images = unlabelled.mixed(unlabelled.images)
        return [self._loss(module(images), y) for module, y in zip(modules, (y2, y1), strict=True)]

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy_sum(logits, target, kind=self.options.loss)


build = CrossPseudoSupervision
