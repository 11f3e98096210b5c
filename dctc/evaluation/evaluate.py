"""Scores of every net over a set of tiles: one exact confusion matrix a net, entropy, agreement, time, memory.

Padding tiles count nowhere, and all sums are reduced over the ranks once, so the result is the same on any number of
ranks.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dctc.data.loaders import DeviceBatch
from dctc.data.tiles import RawBatch
from dctc.evaluation.calibration import Calibration, Reliability
from dctc.evaluation.confusion import Agreement, ConfusionMatrix, EntropyMeter, Scores

Logits = Callable[[Tensor], Mapping[str, Tensor]]
Reduce = Callable[[Tensor], Tensor]
STUDENTS = ("s1", "s2")  # of methods that train two nets on each other's labels: their agreement is measured
CLUTTER = "clutter"  # the mean without a class of this name is reported beside the plain one


@dataclass(frozen=True)
class NetResult:
    """One net's part of an :class:`Evaluation`.

    Attributes:
        scores: from the confusion matrix; None when no tile has a labelled pixel.
        entropy, sharpened_entropy: mean predictive entropy in nats a pixel, of softmax(z) and of softmax(z/T).
        predicted: share of each class among the valid pixels, labelled or not, [K].
        reliability, sharpened_reliability: of softmax(z) and of softmax(z/T) on the labelled pixels.
    """

    scores: Scores | None
    entropy: float
    sharpened_entropy: float
    predicted: list[float]
    reliability: Reliability
    sharpened_reliability: Reliability

    @property
    def without(self) -> list[str]:
        """The classes that are left out of a second mean."""
        return [] if self.scores is None else [name for name in self.scores.names if name == CLUTTER]

    def metrics(self, prefix: str) -> dict[str, float]:
        """All scores, ``PREFIX/miou`` and so on; without a labelled pixel the entropies alone."""
        metrics = {f"{prefix}/entropy": self.entropy, f"{prefix}/sharpened_entropy": self.sharpened_entropy}
        if self.scores is not None:
            metrics |= self.scores.as_metrics(prefix, without=self.without) | self._errors(prefix)
        return metrics

    def pseudo_metrics(self, prefix: str) -> dict[str, float]:
        """How good this net's predictions are as labels for others.

        ``PREFIX/miou``, ``miou_without_clutter``, ``pa``, ``ece``, ``sharpened_ece``, and by class ``PREFIX/iou/NAME``,
        ``precision/NAME``, ``recall/NAME``, ``ece/NAME`` (of the pixels predicted so). Empty without a labelled pixel.
        """
        if self.scores is None:
            return {}
        metrics = {f"{prefix}/miou": self.scores.miou, f"{prefix}/pa": self.scores.pa} | self._errors(prefix)
        if self.without and (means := self.scores.means_without(self.without)):
            metrics[f"{prefix}/miou_without_{CLUTTER}"] = means["miou"]
        metrics |= {f"{prefix}/ece/{name}": value for name, value in self.reliability.ece_by_class.items()}
        columns = {"iou": self.scores.iou, "precision": self.scores.precision, "recall": self.scores.recall}
        for kind, values in columns.items():
            named = zip(self.scores.names, values, self.scores.present, strict=True)
            metrics |= {f"{prefix}/{kind}/{name}": float(value) for name, value, present in named if present}
        return metrics

    def as_record(self) -> dict[str, object]:
        """Everything as plain JSON values; None where no pixel says anything."""
        known = self.scores is not None
        return {
            "scores": None if self.scores is None else self.scores.as_record(self.without),
            "entropy": _number(self.entropy),
            "sharpened_entropy": _number(self.sharpened_entropy),
            "predicted": self.predicted,
            "ece": self.reliability.ece if known else None,
            "sharpened_ece": self.sharpened_reliability.ece if known else None,
            "ece_by_class": self.reliability.ece_by_class,
        }

    def _errors(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}/ece": self.reliability.ece, f"{prefix}/sharpened_ece": self.sharpened_reliability.ece}


@dataclass(frozen=True)
class Evaluation:
    """All nets over the same tiles.

    Attributes:
        agreement: share of valid pixels on which S1 and S2 say the same; None when the method has not both.
        tiles: over all ranks.
        seconds: wall-clock of this rank for all tiles, reading included.
        peak_memory_gib: of this rank, of the device on CUDA and of the process on CPU.
    """

    nets: dict[str, NetResult]
    agreement: float | None
    tiles: int
    seconds: float
    peak_memory_gib: float

    def scores(self, net: str) -> Scores:
        """The scores of one net; raises :class:`ValueError` when nothing was labelled."""
        scores = self.nets[net].scores
        if scores is None:
            raise ValueError(f"no labelled pixel to score net {net} on")
        return scores

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Named as in the tracking contract: ``PREFIX/NET/miou`` and so on."""
        metrics = {
            key: value for name, net in self.nets.items() for key, value in net.metrics(f"{prefix}/{name}").items()
        }
        if self.agreement is not None:
            metrics[f"{prefix}/agreement"] = self.agreement
        return metrics

    def as_record(self) -> dict[str, object]:
        """Everything as plain JSON values."""
        return {
            "nets": {name: net.as_record() for name, net in self.nets.items()},
            "agreement": None if self.agreement is None else _number(self.agreement),
            "tiles": self.tiles,
            "seconds": self.seconds,
            "tiles_per_s": self.tiles / self.seconds,
            "peak_memory_gib": self.peak_memory_gib,
        }


@dataclass
class _NetMeter:
    """The accumulators of one net."""

    confusion: ConfusionMatrix
    entropy: EntropyMeter
    sharpened: EntropyMeter
    calibration: Calibration
    sharpened_calibration: Calibration
    predicted: Tensor

    @classmethod
    def of(cls, classes: int, device: torch.device, temperature: float) -> _NetMeter:
        return cls(
            ConfusionMatrix(classes, device),
            EntropyMeter(1.0, device),
            EntropyMeter(temperature, device),
            Calibration(classes, device),
            Calibration(classes, device, temperature),
            torch.zeros(classes, dtype=torch.int64, device=device),
        )

    def update(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        prediction = logits.argmax(dim=1)
        self.confusion.update(prediction, labels, valid)
        for meter in (self.entropy, self.sharpened):
            meter.update(logits, valid)
        for calibration in (self.calibration, self.sharpened_calibration):
            calibration.update(logits, labels, valid)
        self.predicted.scatter_add_(0, prediction.flatten(), valid.flatten().long())
        return prediction

    def result(self, reduce: Reduce, names: Sequence[str]) -> NetResult:
        calibrations = (self.calibration, self.sharpened_calibration)
        for meter in (self.confusion, self.entropy, self.sharpened, *calibrations):
            meter.reduce(reduce)
        predicted = reduce(self.predicted).double()
        labelled = bool(self.confusion.matrix.any())
        return NetResult(
            scores=self.confusion.scores(names) if labelled else None,
            entropy=self.entropy.value(),
            sharpened_entropy=self.sharpened.value(),
            predicted=(predicted / predicted.sum().clamp(min=1)).tolist(),
            reliability=self.calibration.result(names),
            sharpened_reliability=self.sharpened_calibration.result(names),
        )


def evaluate_tiles(
    logits: Logits,
    batches: Iterable[tuple[DeviceBatch, RawBatch]],
    names: Sequence[str],
    device: torch.device,
    reduce: Reduce,
    temperature: float = 0.5,
) -> Evaluation:
    """Run every net over ``batches`` and score it.

    Args:
        logits: normalised images [B,bands,H,W] -> net name -> logits [B,K,H,W], without gradients.
        batches: of :func:`dctc.data.loaders.evaluation_batches`, this rank's part.
        names: class names in id order.
        reduce: sums a tensor over the ranks; every rank must call this function.
        temperature: T of the sharpened entropy and calibration.
    """
    started = time.perf_counter()
    meters: dict[str, _NetMeter] = {}
    agreement = Agreement(device)
    tiles = torch.zeros((), dtype=torch.int64, device=device)
    for (images, valid, labels), raw in batches:
        if labels is None:
            raise ValueError("evaluation needs batches with labels (255 where there are none)")
        predictions = {}
        for name, z in logits(images).items():
            if name not in meters:
                meters[name] = _NetMeter.of(len(names), device, temperature)
            predictions[name] = meters[name].update(z, labels, valid)
        if predictions.keys() >= set(STUDENTS):
            agreement.update(predictions[STUDENTS[0]], predictions[STUDENTS[1]], valid)
        tiles += (raw["rows"] >= 0).sum().to(device)
    agreement.reduce(reduce)
    results = {name: meter.result(reduce, names) for name, meter in meters.items()}
    return Evaluation(
        nets=results,
        agreement=agreement.value() if results.keys() >= set(STUDENTS) else None,
        tiles=int(reduce(tiles)),
        seconds=time.perf_counter() - started,
        peak_memory_gib=peak_memory_gib(device),
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory use so far in GiB: of the device's allocator on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
