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

from dctc.methods.base import Batch, Boxes, Method, Needs, Round, Update, inference, together
from dctc.methods.losses import Outputs, cross_entropy_sum, fused, mean_prediction, pixel_count, pseudo_label
from dctc.methods.trust import class_weights, must_be_a_power
from dctc.networks import NetworkSpec, build_network

NETS = ("s1", "s2")


@dataclass(frozen=True)
class Options:
    """Switches.

    Attributes:
        weight: w of the cross terms; the authors take 1.5 without CutMix and 1 with it.
        cutmix: mix unlabelled tiles: three boxes that cover a quarter to a half of each.
        loss: as in :mod:`dctc.methods.dctc`.
        class_balance: power of the class weights (:func:`dctc.methods.trust.class_weights`), 0 is none.
    """

    weight: float = 1.5
    cutmix: bool = False
    loss: Literal["multiclass", "binary"] = "multiclass"
    class_balance: float = 0.0

    def __post_init__(self) -> None:
        must_be_a_power(self.class_balance)
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")


class CrossPseudoSupervision(Method):
    """Parts ``s1`` and ``s2``: whole networks with independent initial weights."""

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        super().__init__({name: build_network(spec) for name in NETS})
        self.options = options
        self.classes = spec.classes
        if options.cutmix:
            self.unlabelled_needs = Needs(boxes=Boxes(3, 0.25, 0.5))

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """One update of both nets."""
        labels = [batch.required_labels() for batch in labelled]
        weights = yield from class_weights(labels, self.classes, self.options.class_balance, self.memory)

        def loss(outputs: Outputs, target: Tensor) -> Tensor:
            return cross_entropy_sum(outputs, target, kind=self.options.loss, weights=weights)

        def sums(micro: int) -> Tensor:
            known, unknown = labelled[micro], unlabelled[micro]
            cutmix = self.options.cutmix
            taught = self._label(unknown) if cutmix else []
            images = unknown.mixed(unknown.images) if cutmix else unknown.images
            logits = [together(self.parts[name], known.images, images) for name in NETS]
            losses = [loss(of_known, labels[micro]) for of_known, _ in logits]
            for mine, other in ((0, 1), (1, 0)):
                if cutmix:
                    cross = loss(logits[mine][1], taught[other])
                else:
                    valid = (known.valid, unknown.valid)
                    said = [pseudo_label(fused(z).detach(), v) for z, v in zip(logits[other], valid, strict=True)]
                    cross = loss(logits[mine][0], said[0]) + loss(logits[mine][1], said[1])
                losses.append(self.options.weight * cross)
            return torch.stack(losses)

        def count(y: Tensor, known: Batch, unknown: Batch) -> Tensor:
            seen = unknown.mixed(unknown.valid) if self.options.cutmix else torch.cat([known.valid, unknown.valid])
            return torch.stack([pixel_count(y)] * 2 + [seen.sum().float()] * 2)

        counts = [count(*micro) for micro in zip(labels, labelled, unlabelled, strict=True)]
        yield Update(("s1", "s2", "s2_to_s1", "s1_to_s2"), NETS, counts, sums)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of both nets and of their mean."""
        s1, s2 = (self.parts[name](images) for name in NETS)
        return {"s1": s1, "s2": s2, "mean": mean_prediction(s1, s2)}

    def _label(self, batch: Batch) -> list[Tensor]:
        """What each net says of unlabelled tiles as they are, mixed as their images will be."""
        modules = [self.parts[name] for name in NETS]
        with inference(*modules):
            return [batch.mixed(pseudo_label(module(batch.images), batch.valid)) for module in modules]


build = CrossPseudoSupervision
