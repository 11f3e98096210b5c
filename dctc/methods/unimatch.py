"""UniMatch: one net, weak-to-strong consistency with perturbed features and two strong views (Yang et al., 2023).

One round, one step, with p = softmax of the net on the unlabelled tile as it is, no gradient, and y = argmax p where
max p >= the threshold:
``L = 1/2 [CE(z(x_l), y_l) + 1/4 CE(z(s1(x_u)), y) + 1/4 CE(z(s2(x_u)), y) + 1/2 CE(D(drop(E(x_u))), y)]``,
s1 and s2 two strong views in the geometry of x_u, each mixed with another tile in a box of its own (CutMix; y is mixed
likewise), drop half of the encoder's channels. Sums over the trusted pixels are divided by the number of all pixels
with data. Written from the paper's formulas.

Decided here: the labels come from a pass in evaluation mode (the paper leaves it open), and all tiles of the round,
weak and strong, go through the net as one batch, so that batch norm sees them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dctc.methods.base import Batch, Boxes, Method, Needs, Round, Update, inference
from dctc.methods.lessons import Lesson, lesson_sums, looks
from dctc.methods.losses import pixel_count
from dctc.methods.trust import Trust, class_weights, must_be_a_power
from dctc.networks import NetworkSpec, build_decoder, build_encoder


@dataclass(frozen=True)
class Options:
    """Switches; the defaults are the authors'.

    Attributes:
        confidence: least probability of a pseudo label.
        weight: of the unlabelled tiles against the labelled ones.
        views: strong views, 1 or 2.
        feature_dropout: share of the encoder's channels that are dropped; 0 leaves that term out.
        cutmix: mix the strong views: in half of the tiles one box of 2 to 40 % of the tile.
        loss: as in :mod:`dctc.methods.dctc`.
        class_balance: power of the class weights (:func:`dctc.methods.trust.class_weights`), 0 is none.
    """

    confidence: float = 0.95
    weight: float = 1.0
    views: int = 2
    feature_dropout: float = 0.5
    cutmix: bool = True
    loss: Literal["multiclass", "binary"] = "multiclass"
    class_balance: float = 0.0

    def __post_init__(self) -> None:
        must_be_a_power(self.class_balance)
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence must lie in [0, 1], got {self.confidence}")
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        if self.views not in (1, 2):
            raise ValueError(f"views is the number of strong views, 1 or 2, got {self.views}")
        if not 0 <= self.feature_dropout < 1:
            raise ValueError(f"feature_dropout must lie in [0, 1), got {self.feature_dropout}")


class UniMatch(Method):
    """Parts: the one net in two halves, ``encoder`` and ``s1``, its decoder."""

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        super().__init__({"encoder": build_encoder(spec), "s1": build_decoder(spec)})
        self.options = options
        self.classes = spec.classes
        self.trust = Trust("fixed", options.confidence)
        boxes = Boxes(1, 0.02, 0.4, chance=0.5) if options.cutmix else None
        self.unlabelled_needs = Needs(options.views, boxes=boxes, keys=options.feature_dropout > 0)

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """One update of the net."""
        options = self.options
        labels = [batch.required_labels() for batch in labelled]
        weights = yield from class_weights(labels, self.classes, options.class_balance, self.memory)
        with inference(*self.parts.values()):
            said = [self.logits(batch.images)["s1"] for batch in unlabelled]
        valid = [batch.valid for batch in unlabelled]
        taught = yield from self.trust.labels("s1", said, valid, self.memory, 0.0)
        known = [batch.images for batch in labelled]
        lessons = [Lesson("supervised", "s1", known, labels, [pixel_count(y) for y in labels], weight=0.5)]
        lessons += [
            Lesson(
                f"consistency{look.name}", "s1", look.images, look.labels(taught), look.counts,
                weight=0.5 * options.weight * look.weight, keys=look.keys,
            )
            for look in looks(unlabelled, options.views, options.cutmix, options.feature_dropout > 0)
        ]  # fmt: skip

        def sums(micro: int) -> Tensor:
            return lesson_sums(self.parts, lessons, micro, options.loss, weights, options.feature_dropout)

        counts = [torch.stack(of_micro) for of_micro in zip(*(lesson.counts for lesson in lessons), strict=True)]
        yield Update(tuple(lesson.term for lesson in lessons), ("encoder", "s1"), counts, sums)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of the net."""
        return {"s1": self.parts["s1"](self.parts["encoder"](images), images.shape[-2:])}


build = UniMatch
