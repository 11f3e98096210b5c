"""How far a net's confidence can be trusted: expected calibration error, by predicted class.

Of the pixels predicted with a confidence of about 0.9, nine tenths should be right. Counts and confidences are summed
as integers on the device, without a host synchronisation, and over the ranks once, so the result depends on no layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.evaluation.confusion import SumOverRanks
from shards.manifest import IGNORE

BINS = 15  # of equal width, as is usual
ONE = 2**24  # a confidence is summed as a whole number of these parts; float32 has no finer ones near 1


@dataclass(frozen=True)
class Reliability:
    """Labelled pixels by predicted class and bin of confidence.

    Attributes:
        names: K class names.
        pixels, correct: int64 [K,BINS].
        confidence: float64 [K,BINS], the summed confidence.
    """

    names: tuple[str, ...]
    pixels: NDArray[np.int64]
    correct: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over the pixels of |accuracy - confidence| of their bin; nan without any."""
        return _error(self.pixels.sum(0), self.correct.sum(0), self.confidence.sum(0))

    def ece_of(self, index: int) -> float:
        """The same of the pixels that are predicted as one class; nan where none is."""
        return _error(self.pixels[index], self.correct[index], self.confidence[index])

    @property
    def ece_by_class(self) -> dict[str, float]:
        """:meth:`ece_of` by name, of the classes that are predicted somewhere."""
        values = {name: self.ece_of(index) for index, name in enumerate(self.names)}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def rows(self) -> list[list[object]]:
        """A table with a row a bin: bounds, pixels, mean confidence and accuracy (empty in an empty bin)."""
        table: list[list[object]] = [["from", "to", "pixels", "confidence", "accuracy"]]
        sums = (self.pixels.sum(0), self.confidence.sum(0), self.correct.sum(0))
        for number, (pixels, confidence, correct) in enumerate(zip(*sums, strict=True)):
            means = ["", ""] if not pixels else [repr(float(confidence / pixels)), repr(float(correct / pixels))]
            table.append([repr(number / BINS), repr((number + 1) / BINS), int(pixels), *means])
        return table


class Calibration:
    """Counts for a :class:`Reliability` of softmax(z / T) of ``classes`` classes, on ``device``."""

    def __init__(self, classes: int, device: torch.device | str = "cpu", temperature: float = 1.0) -> None:
        self.classes = classes
        self.temperature = temperature
        # Pixels, correct ones, confidence in parts of ONE; the last place is for pixels that do not count.
        self.totals = torch.zeros(3, classes * BINS + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, truth: Tensor, valid: Tensor) -> None:
        """Count the pixels with a label.

        Args:
            logits: float [B,K,H,W], any float dtype.
            truth: int64 [B,H,W], 255 = ignore.
            valid: bool [B,H,W].
        """
        confidence, predicted = torch.softmax(logits.float() / self.temperature, dim=1).max(dim=1)
        confidence = confidence.nan_to_num(0.0)  # no whole number stands for nan
        place = predicted * BINS + (confidence * BINS).long().clamp(0, BINS - 1)
        place = torch.where(valid & (truth != IGNORE), place, self.classes * BINS).flatten()
        values = [torch.ones_like(predicted), predicted == truth, (confidence * ONE).round()]
        for total, value in zip(self.totals, values, strict=True):
            total.scatter_add_(0, place, value.long().flatten())

    def reduce(self, sum_over_ranks: SumOverRanks) -> None:
        """Replace the counts by their sum over ranks; call it once, after the last update."""
        result = sum_over_ranks(self.totals)
        self.totals = self.totals if result is None else result

    def result(self, names: Sequence[str]) -> Reliability:
        """Everything counted so far; waits for the device."""
        pixels, correct, parts = self.totals[:, :-1].view(3, self.classes, BINS).cpu().numpy()
        return Reliability(tuple(names), pixels, correct, parts / ONE)


def _error(pixels: NDArray[np.int64], correct: NDArray[np.int64], confidence: NDArray[np.float64]) -> float:
    total = pixels.sum()
    return float(np.abs(correct - confidence).sum() / total) if total else math.nan
