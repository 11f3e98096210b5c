"""What a training method is: named parts, and a round made of updates.

A method says *what* (which loss moves which parts); the engine says *how* (precision, accumulation, wrapping, clipping,
stepping). No method knows of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

IGNORE = 255


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device of the networks.

    Attributes:
        images: normalised, float32 [B,bands,H,W].
        valid: bool [B,H,W], False where the image has no data.
        labels: int64 [B,H,W] with 255 = ignore; None in the unlabelled stream.
    """

    images: Tensor
    valid: Tensor
    labels: Tensor | None = None

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


class Method(ABC):
    """A training method.

    Attributes:
        parts: name -> module. The engine puts each module into its wrapper here before training, so a method always
            calls ``self.parts[name]``.
        headline: the net whose score is the method's score; never picked by a test score.
        uses_unlabelled: whether the method wants the second stream at all.
        temperature: T of the sharpened entropy that is reported.
    """

    headline: ClassVar[str] = "s1"
    uses_unlabelled: ClassVar[bool] = True
    temperature: float = 0.5

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts: dict[str, nn.Module] = dict(parts)

    @abstractmethod
    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Iterator[Update]:
        """The updates of round ``step`` (from 0), in order, over the micro-batches of both streams of this rank.

        The engine runs each update before it asks for the next one, so what stands between two ``yield`` sees the
        parameters as the last update left them.
        """

    @abstractmethod
    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Net name -> float logits [B,classes,H,W] of normalised images [B,bands,H,W]."""


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
