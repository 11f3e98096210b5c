"""Mean Teacher: a student that must agree with the moving average of its own weights (Tarvainen and Valpola, 2017).

One round: ``L = CE(student(a(x_l)), y) + w(t) MSE(softmax student(a(x)), softmax ema(b(x)))`` over labelled and
unlabelled tiles x, with a and b two independent photometric views of one geometry; then the average follows,
``ema = alpha ema + (1 - alpha) student`` with alpha = min(1 - 1/(t+1), cap). Written from the paper's formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dctc.methods.base import IGNORE, Batch, Follow, Method, Needs, Round, Update, inference, together
from dctc.methods.losses import Outputs, cross_entropy_sum, pixel_count, probability_distance_sum, ramp_up
from dctc.methods.trust import class_weights, must_be_a_power
from dctc.networks import NetworkSpec, build_network


@dataclass(frozen=True)
class Options:
    """Switches.

    Attributes:
        weight: w of the consistency, reached after the ramp.
        ramp: share of the rounds over which it grows as exp(-5(1-t)^2).
        views: how student and average see a tile apart: ``noise`` of deviation 0.15 on the input, as in the paper, or
            ``strong`` photometry, which a short run on few labels cannot afford (docs/comparing.md).
        cap: largest alpha. A run of fewer than some thousand rounds needs less than 0.999, which averages over a
            thousand rounds.
        loss: as in :mod:`dctc.methods.dctc`.
        class_balance: power of the class weights (:func:`dctc.methods.trust.class_weights`) of labels; 0 is none.
    """

    weight: float = 10.0
    ramp: float = 0.4
    cap: float = 0.999
    views: Literal["noise", "strong"] = "noise"
    loss: Literal["multiclass", "binary"] = "multiclass"
    class_balance: float = 0.0

    def __post_init__(self) -> None:
        must_be_a_power(self.class_balance)
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        for name in ("ramp", "cap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


class MeanTeacher(Method):
    """Parts: ``s1``, the student, and ``ema``, the average of its weights and batch-norm statistics.

    The average labels in evaluation mode; it is the net that is tested.
    """

    headline: ClassVar[str] = "ema"

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        student, average = build_network(spec), build_network(spec)
        average.load_state_dict(student.state_dict())
        super().__init__({"s1": student, "ema": average})
        self.options = options
        self.classes = spec.classes
        self.labelled_needs = self.unlabelled_needs = Needs(views=2, kind=options.views)

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """One update of the student, then the average follows."""
        labels = [torch.where(b.view_valid[0], b.required_labels(), IGNORE) for b in labelled]
        balance = yield from class_weights(labels, self.classes, self.options.class_balance, self.memory)
        weight = self.options.weight * ramp_up(step, 0, round(self.options.ramp * self.length.rounds))

        def sums(micro: int) -> Tensor:
            batches = labelled[micro], unlabelled[micro]
            known, unknown = together(self.parts["s1"], *(batch.views[0] for batch in batches))
            supervised = cross_entropy_sum(known, labels[micro], kind=self.options.loss, weights=balance)
            consistency = self._apart(known, batches[0]) + self._apart(unknown, batches[1])
            return torch.stack([supervised, weight * consistency])

        counts = [
            torch.stack([pixel_count(y), (_seen(a).sum() + _seen(b).sum()).float()])
            for y, a, b in zip(labels, labelled, unlabelled, strict=True)
        ]
        yield Update(("supervised", "consistency"), ("s1",), counts, sums)
        yield Follow("ema", "s1", keep=min(1 - 1 / (step + 1), self.options.cap))

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of the student and of the average."""
        return {name: self.parts[name](images) for name in ("s1", "ema")}

    def _apart(self, outputs: Outputs, batch: Batch) -> Tensor:
        """How far the student's prediction of one view is from the average's of the other."""
        with inference(self.parts["ema"]):
            expected = torch.softmax(self.parts["ema"](batch.views[1]).float(), dim=1)
        return probability_distance_sum(outputs, expected, _seen(batch))


def _seen(batch: Batch) -> Tensor:
    return batch.view_valid[0] & batch.view_valid[1]


build = MeanTeacher
