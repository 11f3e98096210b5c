"""What a training method is: named parts, and a round made of steps on them.

A method says *what* (which loss moves which parts); the engine says *how* (precision, accumulation, wrapping, clipping,
stepping). No method knows of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

IGNORE = 255


@dataclass(frozen=True)
class Boxes:
    """CutMix boxes: ``count`` in a tile, of equal area, whose areas sum to a share uniform in [smallest, largest].

    A tile has them with probability ``chance``, else none.
    """

    count: int = 3
    smallest: float = 0.25
    largest: float = 0.5
    chance: float = 1.0


@dataclass(frozen=True)
class Needs:
    """What a method needs of a stream beside images and labels.

    Attributes:
        views: how many photometric views of each sample, independent of each other and in the geometry of its image.
        kind: of the views: ``strong`` photometry, or ``noise`` alone, of deviation 0.15.
        boxes: CutMix boxes, drawn apart for each view (once where there is none).
        keys: a random number for each sample, for what a method draws itself.
    """

    views: int = 0
    kind: Literal["strong", "noise"] = "strong"
    boxes: Boxes | None = None
    keys: bool = False


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device of the networks.

    Attributes:
        images: normalised, float32 [B,bands,H,W].
        valid: bool [B,H,W], False where the image has no data.
        labels: int64 [B,H,W] with 255 = ignore; None in the unlabelled stream.
        views: as ``images``, as many as the method needs; each pixel shows what it shows in ``images``.
        view_valid: as ``valid``, of each view, where more may be missing.
        boxes: bool [M,B,H,W], M = number of views but at least 1, where a sample shows its partner instead; None when
            the method does not need them. All False where no sample of another tile is at hand.
        partner: int64 [B], the sample of this micro-batch that a sample is mixed with; None without ``boxes``.
        keys: a number in [0, 2^63) for each sample, the same on any layout; empty when the method does not need them.
    """

    images: Tensor
    valid: Tensor
    labels: Tensor | None = None
    views: Sequence[Tensor] = ()
    view_valid: Sequence[Tensor] = ()
    boxes: Tensor | None = None
    partner: Tensor | None = None
    keys: Sequence[int] = ()

    def mixed(self, tensor: Tensor, view: int = 0) -> Tensor:
        """``tensor`` [B,...,H,W] (images, labels, probabilities) with each sample's partner inside its boxes.

        Raises:
            ValueError: the method did not say that it needs boxes.
        """
        if self.boxes is None or self.partner is None:
            raise ValueError("this batch has no CutMix boxes: the method must declare them in its needs")
        inside = self.boxes[view]
        inside = inside.reshape(len(inside), *([1] * (tensor.dim() - 3)), *inside.shape[-2:])
        return torch.where(inside, tensor[self.partner], tensor)

    def required_labels(self) -> Tensor:
        """The labels; raises :class:`ValueError` in the unlabelled stream."""
        if self.labels is None:
            raise ValueError("this batch carries no labels: a method asked the unlabelled stream for them")
        return self.labels


@dataclass(frozen=True)
class Update:
    """One exact optimizer step on some parts.

    The objective is ``sum_t (sum of term t over all pixels) / (count of term t over all pixels)``, where "all" spans
    every micro-batch of every rank. The counts are known before the first forward, so that accumulation and any number
    of ranks change nothing.

    Attributes:
        terms: names of the loss terms, for the log.
        parts: names of the parts that step; no other part moves.
        counts: one float tensor [terms] a micro-batch: how many pixels its sums run over.
        sums: micro-batch number -> float32 tensor [terms] with the summed loss of each term, with gradient.
        rate: factor of the learning rate in this step. Not of the loss, which Adam would scale back.
    """

    terms: tuple[str, ...]
    parts: tuple[str, ...]
    counts: Sequence[Tensor]
    sums: Callable[[int], Tensor]
    rate: float = 1.0


@dataclass(frozen=True)
class Follow:
    """Weights and buffers of a part move towards another's: ``keep * own + (1 - keep) * leader``.

    ``keep = 0`` copies. Integer buffers are always copied. Both parts must be of one architecture; several leaders are
    together one: the parameters and buffers of the first, then those of the next.
    """

    part: str
    leader: str | tuple[str, ...]
    keep: float = 0.0

    @property
    def leaders(self) -> tuple[str, ...]:
        """Their names."""
        return (self.leader,) if isinstance(self.leader, str) else self.leader


@dataclass(frozen=True)
class Restart:
    """The optimizers of these parts forget their moments, as if they had never stepped."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """A look at all tiles of the unlabelled set, each once and as it is (no augmentation).

    The round gets the sum over all batches of all ranks back: ``total = yield Survey(of)``.

    Attributes:
        of: batch -> tensor of counts on the batch's device, int64 or float64 and of one shape always; called without
            gradients, with all parts in evaluation mode. Padding tiles have no valid pixel.
    """

    of: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Total:
    """Counts of this rank's tiles that a method needs of all ranks': the sum comes back, ``total = yield Total(own)``;
    None where operations are counted only.

    Attributes:
        own: int64 or float64, on the device; of the same shape on every rank.
    """

    own: Tensor


Step = Update | Follow | Restart | Survey | Total
Round = Generator[Step, Any, None]
"""What :meth:`Method.round` returns; the engine sends the result of a :class:`Survey` or :class:`Total` back."""


@dataclass(frozen=True)
class Length:
    """Rounds of the whole run, and of one epoch."""

    rounds: int = 1
    epoch: int = 1


class Method(ABC):
    """A training method.

    Attributes:
        parts: name -> module. The engine puts each module into its wrapper here before training, so a method always
            calls ``self.parts[name]``.
        headline: the net whose score is the method's score; never picked by a test score.
        uses_unlabelled: whether the method wants the second stream at all.
        labelled_needs, unlabelled_needs: what it needs of either stream beside images and labels.
        temperature: T of the sharpened entropy that is reported.
        length: of the run; the engine sets it before the first round.
        cycle: epochs after which the same kinds of rounds come again.
        memory: what the method must remember from round to round beside its parts, as JSON values; it is part of each
            checkpoint and put back before a run goes on. The same on all ranks.
    """

    headline: ClassVar[str] = "s1"
    uses_unlabelled: ClassVar[bool] = True
    temperature: float = 0.5
    cycle: int = 1

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts: dict[str, nn.Module] = dict(parts)
        self.labelled_needs = Needs()
        self.unlabelled_needs = Needs()
        self.length = Length()
        self.memory: dict[str, Any] = {}

    def idle_options(self) -> list[str]:
        """A line for each option that has been chosen and does nothing in a run of this length."""
        return []

    def changes(self) -> list[int]:
        """Rounds from which on a round has other work than before, in a run of this length."""
        return []

    @abstractmethod
    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """The steps of round ``step`` (from 0), in order, over the micro-batches of both streams of this rank.

        The engine makes each step before it asks for the next one, so what stands between two ``yield`` sees the
        parameters as the last step left them. The sums of an update call a part that steps once: DeepSpeed's engines
        reduce no gradient of a part that was called twice. Tiles of both streams go through it :func:`together`.
        """

    @abstractmethod
    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Net name -> float logits [B,classes,H,W] of normalised images [B,bands,H,W]."""


def together(network: Callable[[Tensor], Any], *images: Tensor) -> list[Any]:
    """The outputs of ``network`` for each of ``images`` [B_i,bands,H,W], from one call with all of them as one batch.

    Batch norm sees them as one batch, too. An output is a tensor, or a tuple of tensors, whose first axis is cut.
    """
    return cut(network(joined(images)), [len(batch) for batch in images])


def joined(images: Sequence[Tensor]) -> Tensor:
    """Batches as one batch, in their memory format."""
    return images[0] if len(images) == 1 else torch.cat(list(images))


def cut(outputs: Any, sizes: Sequence[int]) -> list[Any]:
    """A net's output for one batch, a tensor or a tuple of tensors, as outputs for batches of ``sizes``."""
    if isinstance(outputs, Tensor):
        return list(torch.split(outputs, list(sizes)))
    return list(zip(*(torch.split(output, list(sizes)) for output in outputs), strict=True))


def updates(steps: Round) -> Iterator[Update]:
    """The steps of a round of a method that makes updates alone, for whoever runs them without a trainer.

    A :class:`Total` is that of one process.

    Raises:
        TypeError: there is another step.
    """
    answer: Tensor | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            return
        answer = step.own if isinstance(step, Total) else None
        if isinstance(step, Update):
            yield step
        elif answer is None:
            raise TypeError(f"{type(step).__name__} is no update: only the trainer makes such steps")


@contextmanager
def inference(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for ``modules``; afterwards each layer is in the mode that it had."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode
