"""Scores of every net over a set of tiles: one exact confusion matrix a net, entropy, agreement, time, memory.

Padding tiles count nowhere, and all sums are reduced over the ranks once, so the result is the same on any number of
ranks.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dctc.data.loaders import DeviceBatch
from dctc.data.tiles import RawBatch
from dctc.evaluation.calibration import Calibration, Reliability
from dctc.evaluation.confusion import Agreement, ConfusionMatrix, EntropyMeter, Scores

Logits = Callable[[Tensor], Mapping[str, Tensor]]
Reduce = Callable[[Tensor], Tensor]
STUDENTS = ("s1", "s2")
CLUTTER = "clutter"  # the mean without a class of this name is reported beside the plain one


@dataclass(frozen=True)
class NetResult:
    """One net's part of an :class:`Evaluation`.

    Attributes:
        scores: from the confusion matrix; None when no tile has a labelled pixel.
        entropy, sharpened_entropy: mean predictive entropy in nats a pixel, of softmax(z) and of softmax(z/T).
        predicted: share of each class among the valid pixels, labelled or not, [K].
        reliability: of softmax(z) on the labelled pixels.
    """

    scores: Scores | None
    entropy: float
    sharpened_entropy: float
    predicted: list[float]
    reliability: Reliability

    def pseudo_metrics(self, prefix: str) -> dict[str, float]:
        """How good this net's predictions are as labels for others: ``PREFIX/miou``, ``pa``, ``ece``, and by class
        ``PREFIX/iou/NAME``, ``precision/NAME``, ``recall/NAME``. Empty without a labelled pixel."""
        if self.scores is None:
            return {}
        metrics = {f"{prefix}/miou": self.scores.miou, f"{prefix}/pa": self.scores.pa}
        metrics[f"{prefix}/ece"] = self.reliability.ece
        columns = {"iou": self.scores.iou, "precision": self.scores.precision, "recall": self.scores.recall}
        for kind, values in columns.items():
            named = zip(self.scores.names, values, self.scores.present, strict=True)
            metrics |= {f"{prefix}/{kind}/{name}": float(value) for name, value, present in named if present}
        return metrics


@dataclass(frozen=True)
class Evaluation:
    """All nets over the same tiles.

    Attributes:
        agreement: share of valid pixels on which S1 and S2 say the same; None when the method has no S2.
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
        metrics: dict[str, float] = {}
        for name, net in self.nets.items():
            if net.scores is not None:
                without = [CLUTTER] if CLUTTER in net.scores.names else []
                metrics |= net.scores.as_metrics(f"{prefix}/{name}", without=without)
                metrics[f"{prefix}/{name}/ece"] = net.reliability.ece
            metrics[f"{prefix}/{name}/entropy"] = net.entropy
            metrics[f"{prefix}/{name}/sharpened_entropy"] = net.sharpened_entropy
        if self.agreement is not None:
            metrics[f"{prefix}/agreement"] = self.agreement
        return metrics

    def as_record(self) -> dict[str, object]:
        """Everything as plain JSON values."""
        nets = {
            name: {
                "scores": None if net.scores is None else net.scores.as_record(),
                "entropy": net.entropy,
                "sharpened_entropy": net.sharpened_entropy,
                "predicted": net.predicted,
                "ece": None if net.scores is None else net.reliability.ece,
            }
            for name, net in self.nets.items()
        }
        return {
            "nets": nets,
            "agreement": self.agreement,
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
    predicted: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.predicted = torch.zeros(self.confusion.classes, dtype=torch.int64, device=self.confusion.counts.device)

    def update(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        prediction = logits.argmax(dim=1)
        self.confusion.update(prediction, labels, valid)
        self.entropy.update(logits, valid)
        self.sharpened.update(logits, valid)
        self.calibration.update(logits, labels, valid)
        self.predicted.scatter_add_(0, prediction.flatten(), valid.flatten().long())
        return prediction

    def result(self, reduce: Reduce, names: Sequence[str]) -> NetResult:
        for meter in (self.confusion, self.entropy, self.sharpened, self.calibration):
            meter.reduce(reduce)
        predicted = reduce(self.predicted).double()
        labelled = bool(self.confusion.matrix.any())
        return NetResult(
            scores=self.confusion.scores(names) if labelled else None,
            entropy=self.entropy.value(),
            sharpened_entropy=self.sharpened.value(),
            predicted=(predicted / predicted.sum().clamp(min=1)).tolist(),
            reliability=self.calibration.result(names),
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
        temperature: T of the sharpened entropy.
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
                meters[name] = _NetMeter(
                    ConfusionMatrix(len(names), device),
                    EntropyMeter(1.0, device),
                    EntropyMeter(temperature, device),
                    Calibration(len(names), device),
                )
            predictions[name] = meters[name].update(z, labels, valid)
        if all(student in predictions for student in STUDENTS):
            agreement.update(predictions["s1"], predictions["s2"], valid)
        tiles += (raw["rows"] >= 0).sum().to(device)
    agreement.reduce(reduce)
    results = {name: meter.result(reduce, names) for name, meter in meters.items()}
    return Evaluation(
        nets=results,
        agreement=agreement.value() if "s2" in results else None,
        tiles=int(reduce(tiles)),
        seconds=time.perf_counter() - started,
        peak_memory_gib=peak_memory_gib(device),
    )


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory use so far in GiB: of the device's allocator on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
