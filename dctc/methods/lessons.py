"""What the students learn in an update: which tiles, as they are shown, against which labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dctc.methods.base import IGNORE, Batch, cut, joined
from dctc.methods.losses import cross_entropy_sum
from dctc.methods.trust import drop_channels


class Lesson(NamedTuple):
    """A loss term of that name of one student, on these micro-batches.

    Attributes:
        images: of each micro-batch; lessons on one list of them share a pass of the encoder.
        counts: pixels that the sum of each micro-batch is divided by, float32 scalars.
        weight: factor of the loss.
        keys: of each micro-batch, when channels of its features are dropped.
    """

    term: str
    student: str
    images: Sequence[Tensor]
    labels: Sequence[Tensor]
    counts: Sequence[Tensor]
    temperature: float = 1.0
    weight: float = 1.0
    keys: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Look:
    """One way to show unlabelled tiles to the students.

    Attributes:
        name: ends the names of its loss terms.
        batches: the micro-batches.
        view: the strong view; None shows the tiles as they are.
        boxes: which boxes they are mixed in; None does not mix.
        weight: factor of its losses.
        dropped: whether channels of the features are dropped.
    """

    name: str
    batches: Sequence[Batch]
    view: int | None = None
    boxes: int | None = None
    weight: float = 1.0
    dropped: bool = False

    @cached_property
    def images(self) -> list[Tensor]:
        """The tiles as the students see them, of each micro-batch: one list, by which lessons know each other."""
        return [self._mixed(b, b.images if self.view is None else b.views[self.view]) for b in self.batches]

    @cached_property
    def counts(self) -> list[Tensor]:
        """Pixels with data in them, float32 scalars."""
        return [self._mixed(b, self._seen(b)).sum().float() for b in self.batches]

    @property
    def keys(self) -> list[Sequence[int]]:
        """Of each micro-batch, where channels are dropped."""
        return [batch.keys for batch in self.batches] if self.dropped else []

    def labels(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Targets of the tiles as they are, class maps or soft ones, as they are seen here."""
        return [self._label(batch, target) for batch, target in zip(self.batches, targets, strict=True)]

    def _label(self, batch: Batch, target: Tensor) -> Tensor:
        seen = self._seen(batch)
        known = target * seen[:, None] if target.is_floating_point() else torch.where(seen, target, IGNORE)
        return self._mixed(batch, known)

    def _seen(self, batch: Batch) -> Tensor:
        return batch.valid if self.view is None else batch.view_valid[self.view]

    def _mixed(self, batch: Batch, tensor: Tensor) -> Tensor:
        return tensor if self.boxes is None else batch.mixed(tensor, self.boxes)


def looks(batches: Sequence[Batch], views: int, cutmix: bool, dropout: bool) -> list[Look]:
    """The strong views (or the tile as it is where there are none) at equal weights, and beside them, at half of the
    weight, the tile as it is with channels of its features dropped."""
    share = (0.5 if dropout else 1.0) / max(1, views)
    shown = [
        Look("" if k == 0 else f"_view{k + 1}", batches, k if views else None, k if cutmix else None, share)
        for k in range(max(1, views))
    ]
    return [*shown, Look("_dropped", batches, weight=0.5, dropped=True)] if dropout else shown


def lesson_sums(
    parts: Mapping[str, nn.Module],
    lessons: Sequence[Lesson],
    micro: int,
    kind: str,
    weights: Tensor | None,
    dropout: float,
) -> Tensor:
    """Summed losses [lessons] of a micro-batch, from one pass of ``encoder`` over all tiles that are learnt from, and
    one of each student's decoder.

    Args:
        kind, weights: of :func:`dctc.methods.losses.cross_entropy_sum`.
        dropout: share of the channels that go where a lesson has keys.
    """
    groups = {id(lesson.images): lesson for lesson in lessons}
    images = [lesson.images[micro] for lesson in groups.values()]
    sizes = [len(tiles) for tiles in images]
    features = parts["encoder"](joined(images))
    if any(lesson.keys for lesson in lessons):
        pieces = zip(cut(tuple(features), sizes), groups.values(), strict=True)
        kept = [drop_channels(f, lesson.keys[micro], dropout) if lesson.keys else f for f, lesson in pieces]
        features = [torch.cat(maps) for maps in zip(*kept, strict=True)]
    outputs = {
        s: cut(parts[s](features, images[0].shape[-2:]), sizes) for s in dict.fromkeys(x.student for x in lessons)
    }
    places = {group: place for place, group in enumerate(groups)}
    losses = [
        lesson.weight
        * cross_entropy_sum(
            outputs[lesson.student][places[id(lesson.images)]], lesson.labels[micro], lesson.temperature, kind, weights
        )
        for lesson in lessons
    ]
    return torch.stack(losses)
