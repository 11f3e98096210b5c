"""DST-CBC: dynamic self-training with a class-balanced curriculum (Feng et al., 2022).

The net first trains on labels alone. Then come rounds of self-training ("stages" here): a frozen copy of the net labels
the unlabelled tiles, of each class only the most confident share of its pixels, and that share grows from stage to
stage (20, 40, ... 100 %). The loss of a pixel is weighted by the trained net's own probability of its pseudo label, to
the power gamma; labelled pixels weigh 1: ``L = sum(weight * CE) / number of pixels that are not ignored``.

The threshold of a class is the confidence of its top-share quantile over the whole unlabelled set, from histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dctc.methods.base import IGNORE, Batch, Follow, Method, Restart, Round, Survey, Update, inference, together
from dctc.methods.losses import confident_cross_entropy_sum, cross_entropy_sum, pixel_count
from dctc.methods.trust import class_weights, must_be_a_power
from dctc.methods.turns import TURNS, average_views, must_be_turns
from dctc.networks import NetworkSpec, build_network

BINS = 4096  # of confidence in [0, 1], so a threshold is exact to 1/4096


@dataclass(frozen=True)
class Options:
    """Switches.

    Attributes:
        stages: rounds of self-training, of equal length; stage k of n uses the top k/n of each class.
        start: share of the run that is supervised, before the first stage.
        gamma: power of the dynamic weight.
        restart: each stage begins with a fresh optimizer. The learning rate follows the run's one schedule.
        class_balance: power of the class weights (:func:`dctc.methods.trust.class_weights`), 0 is none.
        label_turns: as in :mod:`dctc.methods.dctc`; not in the paper.
    """

    stages: int = 5
    start: float = 1 / 6
    gamma: float = 9.0
    restart: bool = True
    class_balance: float = 0.0
    label_turns: int = 1

    def __post_init__(self) -> None:
        must_be_turns(self.label_turns)
        must_be_a_power(self.class_balance)
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1, got {self.stages}")
        if not 0 <= self.start < 1:
            raise ValueError(f"start must lie in [0, 1), got {self.start}")
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")


class DSTCBC(Method):
    """Parts: ``s1``, the net, and ``labeller``, its copy from the beginning of the stage.

    ``memory["thresholds"]`` are the classes' confidences from which a pseudo label counts, in this stage.
    """

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        network, copy = build_network(spec), build_network(spec)
        copy.load_state_dict(network.state_dict())
        super().__init__({"s1": network, "labeller": copy})
        self.options = options
        self.classes = spec.classes
        self.turns = TURNS[options.label_turns]

    def first_rounds(self) -> list[int]:
        """The round in which each stage begins."""
        rounds = self.length.rounds
        start = round(self.options.start * rounds)
        return [start + stage * (rounds - start) // self.options.stages for stage in range(self.options.stages)]

    def changes(self) -> list[int]:
        """The round of the first pseudo labels."""
        return self.first_rounds()[:1]

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """One update; before the first one of a stage new labels and thresholds."""
        begins = self.first_rounds()
        labels = [batch.required_labels() for batch in labelled]
        weights = yield from class_weights(labels, self.classes, self.options.class_balance, self.memory)
        if step < begins[0]:
            yield self._update(labelled, labels, [], weights)
            return
        if step in begins:
            yield Follow("labeller", "s1")
            counts = yield Survey(self._confidences)
            stage = max(number for number, first in enumerate(begins) if first == step)
            share = (stage + 1) / self.options.stages
            if counts is not None:  # nothing is looked at where operations are counted only
                self.memory["thresholds"] = thresholds(counts, share)
            if self.options.restart:
                yield Restart(("s1",))
        yield self._update(labelled, labels, [(batch, self._label(batch)) for batch in unlabelled], weights)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of the net."""
        return {"s1": self.parts["s1"](images)}

    def _update(
        self,
        labelled: Sequence[Batch],
        labels: Sequence[Tensor],
        taught: Sequence[tuple[Batch, Tensor]],
        weights: Tensor | None,
    ) -> Update:
        counts = [pixel_count(y) for y in labels]
        if taught:
            counts = [known + pixel_count(y) for known, (_, y) in zip(counts, taught, strict=True)]

        def sums(micro: int) -> Tensor:
            if not taught:
                return cross_entropy_sum(self.parts["s1"](labelled[micro].images), labels[micro], weights=weights)[None]
            batch, y = taught[micro]
            known, unknown = together(self.parts["s1"], labelled[micro].images, batch.images)
            total = cross_entropy_sum(known, labels[micro], weights=weights)
            return (total + confident_cross_entropy_sum(unknown, y, self.options.gamma, weights))[None]

        return Update(("self_training" if taught else "supervised",), ("s1",), [n[None] for n in counts], sums)

    def _label(self, batch: Batch) -> Tensor:
        """The labeller's class where it is confident enough, else ignore."""
        confidence, classes = self._predict(batch)
        least = torch.tensor(self.memory.get("thresholds", [0.0] * self.classes), device=confidence.device)
        return torch.where(batch.valid & (confidence >= least[classes]), classes, IGNORE)

    def _confidences(self, batch: Batch) -> Tensor:
        """Pixels by predicted class and bin of confidence, int64 [K,BINS]."""
        confidence, classes = self._predict(batch)
        bins = (confidence * BINS).long().clamp(max=BINS - 1) + classes * BINS
        counts = torch.zeros(self.classes * BINS, dtype=torch.int64, device=bins.device)
        counts.scatter_add_(0, bins.flatten(), batch.valid.flatten().long())
        return counts.view(self.classes, BINS)

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The labeller's confidence, float32 [B,H,W], and class."""

        def probabilities(images: Tensor) -> Tensor:
            return torch.softmax(self.parts["labeller"](images).float(), dim=1)

        with inference(self.parts["labeller"]):
            confidence, classes = average_views(probabilities, batch.images, self.turns).max(dim=1)
        return confidence, classes


def thresholds(counts: Tensor, share: float) -> list[float]:
    """Of each class the largest edge of a bin from which upwards lies at least ``share`` of its pixels.

    Args:
        counts: int64 [K,BINS], pixels by class and bin of confidence.
        share: in (0, 1]. A class without pixels gets 0.
    """
    above = counts.flip(1).cumsum(1).flip(1)  # pixels in this bin or a higher one
    enough = above >= (share * above[:, :1].double()).ceil()
    last = enough.long().cumsum(1).argmax(1)
    return [float(edge) / counts.shape[1] if total else 0.0 for edge, total in zip(last, above[:, 0], strict=True)]


build = DSTCBC
