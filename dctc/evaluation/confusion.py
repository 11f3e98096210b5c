"""Scores from one exact global confusion matrix, and the entropy and agreement logged beside them.

Every accumulator here keeps plain counts on the device, adds to them without a host synchronisation, and is summed
over ranks once (:meth:`reduce`), so a score does not depend on the number of ranks or the batch size.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.tracking.journal import write_atomically
from shards.errors import InputError
from shards.manifest import IGNORE

Floats = NDArray[np.float64]
SumOverRanks = Callable[[Tensor], Tensor | None]  # in place (all_reduce) or returning the sum
MEANS = ("miou", "pa", "mpa", "f1", "precision", "recall", "fwiou", "kappa")


@dataclass(frozen=True)
class Scores:
    """All scores of one confusion matrix, in float64, as fractions of 1.

    A class with no pixel in the truth and none in the prediction is absent: its per-class scores are nan and it is
    left out of every mean. Of a class that is present, a ratio 0/0 (the precision of a class never predicted, the
    recall of a class never true) counts as 0, as in scikit-learn with ``zero_division=0``. Per class and macro, recall
    is the class accuracy whose mean is MPA.

    ``matrix`` is int64 [K,K], rows truth, columns prediction; ``names`` are the K class names in id order.
    """

    names: tuple[str, ...]
    matrix: NDArray[np.int64]

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """bool [K]: the class has pixels in the truth or in the prediction."""
        present: NDArray[np.bool_] = self._union > 0
        return present

    @cached_property
    def iou(self) -> Floats:
        """float64 [K]: TP / (TP + FP + FN); nan for an absent class. (Equation 17 without its misprint.)"""
        return self._per_class(self._hits, self._union)

    @cached_property
    def precision(self) -> Floats:
        """float64 [K]: TP / (TP + FP); nan for an absent class."""
        return self._per_class(self._hits, self._predicted)

    @cached_property
    def recall(self) -> Floats:
        """float64 [K]: TP / (TP + FN); nan for an absent class."""
        return self._per_class(self._hits, self._true)

    @cached_property
    def f1(self) -> Floats:
        """float64 [K]: 2 TP / (2 TP + FP + FN); nan for an absent class."""
        return self._per_class(2 * self._hits, self._true + self._predicted)

    @property
    def pixels(self) -> int:
        """Pixels counted."""
        return int(self.matrix.sum())

    @property
    def pa(self) -> float:
        """Pixel accuracy: TP of all classes / all pixels."""
        return float(self._hits.sum() / self._true.sum())

    @property
    def mpa(self) -> float:
        """Mean over the present classes of the class accuracy TP / (TP + FN)."""
        return self._mean(self.recall)

    @property
    def miou(self) -> float:
        """Mean IoU over the present classes, clutter included (equation 18 without its misprint)."""
        return self._mean(self.iou)

    @property
    def fwiou(self) -> float:
        """Frequency-weighted IoU: sum over classes of (share of the class in the truth) * IoU."""
        share = self._true / self._true.sum()
        return float((share * np.where(self.present, self.iou, 0.0)).sum())

    @property
    def kappa(self) -> float:
        """Cohen's kappa; 1 when truth and prediction are one and the same single class (0/0 there)."""
        total = self._true.sum()
        chance = float((self._true / total * (self._predicted / total)).sum())
        return 1.0 if chance == 1.0 else (self.pa - chance) / (1.0 - chance)

    def miou_without(self, names: Sequence[str]) -> float:
        """Mean IoU over the present classes other than ``names`` (clutter, say); pixels of these still count as errors.

        Raises:
            ValueError: when a name is no class, or no class is left.
        """
        means = self.means_without(names)
        if not means:
            raise ValueError(f"no class with pixels is left without {', '.join(names)}")
        return means["miou"]

    def means_without(self, names: Sequence[str]) -> dict[str, float]:
        """``miou``, ``mpa``, ``precision``, ``f1`` over the present classes other than ``names``; empty without any.

        Pixels of the classes left out still count as errors of the others.

        Raises:
            ValueError: when a name is no class.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"no class is named {', '.join(unknown)}; the classes are {', '.join(self.names)}")
        kept = self.present & ~np.isin(self.names, list(names))
        columns = {"miou": self.iou, "mpa": self.recall, "precision": self.precision, "f1": self.f1}
        return {key: float(column[kept].mean()) for key, column in columns.items()} if kept.any() else {}

    def as_metrics(self, prefix: str, per_class: bool = True, without: Sequence[str] = ()) -> dict[str, float]:
        """Finite numbers by metric name: ``PREFIX/miou`` ... and ``PREFIX/iou/NAME`` for every present class.

        ``without`` adds ``PREFIX/miou_without_NAME`` (names joined by ``_``) and the others of :meth:`means_without`.
        """
        means = self._means() | self._named_means_without(without)
        metrics = {f"{prefix}/{name}": value for name, value in means.items()}
        if per_class:
            rows = zip(self.names, self.iou, self.present, strict=True)
            metrics |= {f"{prefix}/iou/{name}": float(value) for name, value, present in rows if present}
        return metrics

    def as_record(self, without: Sequence[str] = ()) -> dict[str, object]:
        """Everything as plain JSON values; a score of an absent class is ``None``; ``without`` as in metrics."""
        columns = {"iou": self.iou, "precision": self.precision, "recall": self.recall, "f1": self.f1}
        classes = {
            name: {key: None if math.isnan(column[i]) else float(column[i]) for key, column in columns.items()}
            | {"pixels": int(self._true[i]), "predicted": int(self._predicted[i])}
            for i, name in enumerate(self.names)
        }
        means = self._means() | self._named_means_without(without)
        return means | {"pixels": self.pixels, "classes": classes, "matrix": self.matrix.tolist()}

    def write_csv(self, path: Path, without: Sequence[str] = ()) -> None:
        """The per-class table, one row a class and the means last; an absent class has empty cells. Atomic.

        ``without`` adds a row of the means without these classes.
        """
        rows: list[list[object]] = [["class", "iou", "precision", "recall", "f1", "pixels", "predicted"]]
        for i, name in enumerate(self.names):
            values = [column[i] for column in (self.iou, self.precision, self.recall, self.f1)]
            cells = ["" if math.isnan(value) else repr(float(value)) for value in values]
            rows.append([name, *cells, int(self._true[i]), int(self._predicted[i])])
        means = self._means()
        macro = [repr(means[key]) for key in ("miou", "precision", "recall", "f1")]
        rows.append(["mean", *macro, self.pixels, self.pixels])
        if without and (others := self.means_without(without)):
            others_macro = [repr(others[key]) for key in ("miou", "precision", "mpa", "f1")]
            rows.append([f"mean without {', '.join(without)}", *others_macro, "", ""])
        write_rows(path, rows)

    def write_matrix_csv(self, path: Path) -> None:
        """The confusion matrix in pixels, a row a true class, a column a predicted class. Atomic."""
        rows: list[list[object]] = [["truth \\ prediction", *self.names]]
        rows += [[name, *row] for name, row in zip(self.names, self.matrix.tolist(), strict=True)]
        write_rows(path, rows)

    @cached_property
    def _hits(self) -> Floats:
        return np.diagonal(self.matrix).astype(np.float64)

    @cached_property
    def _true(self) -> Floats:
        return np.asarray(self.matrix.sum(axis=1), np.float64)

    @cached_property
    def _predicted(self) -> Floats:
        return np.asarray(self.matrix.sum(axis=0), np.float64)

    @property
    def _union(self) -> Floats:
        return self._true + self._predicted - self._hits

    def _per_class(self, part: Floats, whole: Floats) -> Floats:
        ratio = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
        return np.where(self.present, ratio, np.nan)

    def _mean(self, values: Floats) -> float:
        return float(values[self.present].mean())

    def _named_means_without(self, names: Sequence[str]) -> dict[str, float]:
        means = self.means_without(names) if names else {}
        return {f"{key}_without_{'_'.join(names)}": value for key, value in means.items()}

    def _means(self) -> dict[str, float]:
        macro = {name: self._mean(getattr(self, name)) for name in ("f1", "precision", "recall")}
        return {name: macro[name] if name in macro else float(getattr(self, name)) for name in MEANS}


class ConfusionMatrix:
    """Counts of (truth, prediction) pairs of ``classes`` classes, exact int64, on ``device``."""

    def __init__(self, classes: int, device: torch.device | str = "cpu", ignore: int = IGNORE) -> None:
        self.classes = classes
        self.ignore = ignore
        # K*K pairs, then the pixels left out, then those whose class id is impossible.
        self.counts = torch.zeros(classes * classes + 2, dtype=torch.int64, device=device)

    @property
    def matrix(self) -> Tensor:
        """int64 [K,K] on the device, rows truth, columns prediction."""
        return self.counts[: self.classes**2].view(self.classes, self.classes)

    @torch.no_grad()
    def update(self, prediction: Tensor, truth: Tensor, valid: Tensor | None = None) -> None:
        """Count every pixel whose truth is not the ignore index and that is ``valid``; never waits for the device.

        Args:
            prediction: integer class ids, any shape.
            truth: integer class ids of the same shape, with the ignore index.
            valid: bool of the same shape, False where a pixel does not count (nodata, padding).

        Raises:
            ValueError: when the shapes differ.
        """
        if prediction.shape != truth.shape or (valid is not None and valid.shape != truth.shape):
            shapes = [tuple(t.shape) for t in (prediction, truth, valid) if t is not None]
            raise ValueError(f"prediction, truth and valid must have one shape, not {shapes}")
        size = self.classes
        prediction, truth = prediction.long(), truth.long()
        possible = (truth >= 0) & (truth < size) & (prediction >= 0) & (prediction < size)
        left_out = truth == self.ignore
        if valid is not None:
            left_out = left_out | ~valid
        bins = torch.where(possible, truth * size + prediction, size * size + 1)
        bins = torch.where(left_out, size * size, bins).flatten()
        # Not bincount: on CUDA it reads the largest value back to size its result, which waits for the device.
        # Integer addition in any order is exact, so this is deterministic too.
        self.counts.scatter_add_(0, bins, self.counts.new_ones(()).expand_as(bins))

    def reduce(self, sum_over_ranks: SumOverRanks) -> None:
        """Replace the counts by their sum over ranks; call it once, after the last update."""
        self.counts = _reduced(self.counts, sum_over_ranks)

    def scores(self, names: Sequence[str]) -> Scores:
        """The scores of everything counted so far; waits for the device.

        Raises:
            InputError: when no pixel was counted, or some had a class id that is neither a class nor the ignore index.
            ValueError: when ``names`` are not K.
        """
        if len(names) != self.classes:
            raise ValueError(f"{len(names)} names for {self.classes} classes")
        counts = self.counts.cpu().numpy().copy()
        if counts[-1]:
            raise InputError(
                f"{int(counts[-1])} pixels have a class id that is not in 0..{self.classes - 1} and not {self.ignore}: "
                "the labels and the class list do not belong together"
            )
        matrix = counts[: self.classes**2].reshape(self.classes, self.classes)
        if not matrix.any():
            raise InputError("no labelled pixel to score: every pixel is ignored, or the split has no labels")
        matrix.setflags(write=False)
        return Scores(tuple(names), matrix)


class EntropyMeter:
    """Mean predictive entropy of softmax(z / T), in nats per valid pixel."""

    def __init__(self, temperature: float = 1.0, device: torch.device | str = "cpu") -> None:
        self.temperature = temperature
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # nats, pixels

    @torch.no_grad()
    def update(self, logits: Tensor, valid: Tensor | None = None) -> None:
        """Add float logits [B,K,H,W] (any float dtype) where ``valid`` bool [B,H,W]; never waits for the device."""
        nats = entropy(logits, self.temperature)
        counted = torch.ones_like(nats, dtype=torch.bool) if valid is None else valid
        # where, not a product: nan * 0 of a nodata pixel would poison the sum.
        self.totals += torch.stack([torch.where(counted, nats, 0).double().sum(), counted.sum().double()])

    def reduce(self, sum_over_ranks: SumOverRanks) -> None:
        """Replace the totals by their sum over ranks."""
        self.totals = _reduced(self.totals, sum_over_ranks)

    def value(self) -> float:
        """Nats per pixel; nan when no pixel was valid. Waits for the device."""
        return _ratio(self.totals)


class Agreement:
    """The share of valid pixels on which two nets predict the same class."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.totals = torch.zeros(2, dtype=torch.int64, device=device)  # equal, pixels

    @torch.no_grad()
    def update(self, first: Tensor, second: Tensor, valid: Tensor | None = None) -> None:
        """Add integer class ids of one shape where ``valid`` (bool, the same shape); never waits for the device."""
        equal = first == second
        counted = torch.ones_like(equal) if valid is None else valid
        self.totals += torch.stack([(equal & counted).sum(), counted.sum()])

    def reduce(self, sum_over_ranks: SumOverRanks) -> None:
        """Replace the totals by their sum over ranks."""
        self.totals = _reduced(self.totals, sum_over_ranks)

    def value(self) -> float:
        """A share in [0, 1]; nan when no pixel was valid. Waits for the device."""
        return _ratio(self.totals)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(z / T) for logits [B,K,...]: float32 [B,...], computed in log space."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=1)
    # A masked class (z = -inf) has p = 0 and adds 0, not 0 * inf.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(torch.float32).min)).sum(dim=1)


def _reduced(tensor: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
    result = sum_over_ranks(tensor)
    return tensor if result is None else result


def _ratio(totals: Tensor) -> float:
    part, whole = totals.tolist()
    return float(part) / float(whole) if whole else math.nan


def write_rows(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """A CSV file, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue().encode())
