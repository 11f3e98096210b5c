"""The supervised baseline: one network, cross-entropy on the labelled tiles alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dctc.methods.base import Batch, Method, Round, Update
from dctc.methods.losses import cross_entropy_sum, pixel_count
from dctc.methods.trust import class_weights, must_be_a_power
from dctc.networks import NetworkSpec, build_network


@dataclass(frozen=True)
class Options:
    """Switches.

    Attributes:
        attention: the teacher's channel attention in the network.
        loss: as in :mod:`dctc.methods.dctc`.
        class_balance: power of the class weights (:func:`dctc.methods.trust.class_weights`), 0 is none.
    """

    attention: bool = False
    loss: Literal["multiclass", "binary"] = "multiclass"
    class_balance: float = 0.0

    def __post_init__(self) -> None:
        must_be_a_power(self.class_balance)


class Supervised(Method):
    """One part, ``network``; its net is called ``s1`` like every method's headline."""

    uses_unlabelled: ClassVar[bool] = False

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        super().__init__({"network": build_network(spec, attention=options.attention)})
        self.options = options
        self.classes = spec.classes

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """One update on the labelled batch."""
        labels = [batch.required_labels() for batch in labelled]
        weights = yield from class_weights(labels, self.classes, self.options.class_balance, self.memory)

        def sums(micro: int) -> Tensor:
            logits = self.parts["network"](labelled[micro].images)
            return cross_entropy_sum(logits, labels[micro], kind=self.options.loss, weights=weights)[None]

        yield Update(("supervised",), ("network",), [pixel_count(y)[None] for y in labels], sums)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of the one net."""
        return {"s1": self.parts["network"](images)}


build = Supervised
