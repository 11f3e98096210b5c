"""What is looked at while a run trains and when it is over: scores, pseudo-label quality, pictures, model files."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dctc.bundle import Description, save_bundle
from dctc.data.loaders import DeviceBatch, Normaliser, evaluation_batches
from dctc.data.order import Indices, Layout
from dctc.data.tiles import RawBatch, TileDataset
from dctc.engine.checkpoint import Progress
from dctc.engine.parallel import Parallel
from dctc.engine.parts import Part
from dctc.engine.precision import Precision
from dctc.evaluation.evaluate import Evaluation, evaluate_tiles
from dctc.evaluation.pictures import draw_panels, save_tiles
from dctc.evaluation.report import write_evaluation
from dctc.methods.base import Batch, Method, Survey, inference
from shards.errors import InputError
from shards.manifest import IGNORE, Dataset

PROBE_TILES = (
    32  # unlabelled tiles looked at beside each validation: a fixed sample, so that its curve is one of the nets
)
DYING_BELOW = 0.1  # a class is dying when a net predicts less than this part of its share in the labels ...
DYING_FROM = 0.005  # ... and that share is at least this


@dataclass
class Watch:
    """Reads a method, never trains it. All ranks call every method of it.

    Attributes:
        parts: the method's parts as the strategy holds them.
        rows: index rows by purpose: "val", "test", "unlabelled", "probe" (some of them), "labelled",
            "pictures".
        describe: what a model file of now says of itself.
        warn: shows one line to the user.
        warn_from: round from which a class may be called dying; an untrained net predicts few classes.
        substitute: another tile stands in for a damaged one where nothing is scored; scores always stop at damage.
        compiled: the parts are compiled for the shapes of training.
    """

    method: Method
    parts: Mapping[str, Part]
    dataset: Dataset
    parallel: Parallel
    precision: Precision
    layout: Layout
    folder: Path
    rows: dict[str, Indices]
    batch: int
    workers: int
    describe: Callable[[Progress], Description]
    warn: Callable[[str], None]
    warn_from: int
    substitute: bool = False
    compiled: bool = False
    _label_shares: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
    _dying: set[tuple[str, str]] = field(default_factory=set)
    _unlabelled: dict[str, dict[str, Any]] = field(default_factory=dict)  # as the last validation found it, by net

    def validate(self, progress: Progress) -> dict[str, float]:
        """Score the validation split; keep ``best.safetensors``. Metrics ``val/``, ``best/val_miou``, ``train/``."""
        metrics = self._probe(progress)
        if len(self.rows["val"]):
            evaluation = self._evaluate(self.rows["val"], self.precision.autocast())
            metrics |= evaluation.as_metrics("val")
            score = evaluation.scores(self.method.headline).miou
            if progress.best is None or score > progress.best:
                progress.best = score
                self.save_model("best.safetensors", progress)
            metrics["best/val_miou"] = progress.best
        return metrics

    def save_model(self, name: str, progress: Progress) -> Path:
        """Write a self-describing model file into the run's folder (main rank)."""
        path = self.folder / name
        weights = {name: part.weights() for name, part in self.parts.items()}
        if self.parallel.is_main:
            save_bundle(path, self.describe(progress), weights)
        return path

    def test(self) -> Evaluation | None:
        """Score the test split in float32, as ``dctc evaluate`` does, and write the report (main rank).

        Returns None when the dataset has no labelled test tile.
        """
        if not len(self.rows["test"]):
            self.warn("the dataset has no labelled test tile: no final test")
            return None
        with ExitStack() as full_precision:
            for part in self.parts.values():
                full_precision.enter_context(part.full_precision())
            evaluation = self._evaluate(self.rows["test"], nullcontext())
        if self.parallel.is_main:
            write_evaluation(self.folder, evaluation, "test")
        return evaluation

    def report(
        self,
        progress: Progress,
        evaluation: Evaluation | None,
        tested: bool,
        tiles_per_round: int,
        cost: Mapping[str, float],
    ) -> Path:
        """Write ``report.json``: final metrics, pseudo labels, time, memory, tiles/s, versions (main rank).

        ``tested`` says whether a test was asked for; ``evaluation`` is None without one, or without labels for it.
        ``cost`` may have ``perf/peak_memory_gib`` and ``perf/round_gflop``; what is not known is null in the report.
        ``unlabelled`` is what the last validation found, by net: the quality of its pseudo labels against labels that
        are held back, and the names of the classes that it hardly predicts.
        """
        if not self._unlabelled:  # that was another process, or never
            self._probe(progress)
        record = {
            "rounds": progress.rounds,
            "train_seconds": progress.seconds,
            "train_tiles_per_s": progress.rounds * tiles_per_round / progress.seconds if progress.seconds else None,
            "round_gflop": cost.get("perf/round_gflop"),
            "peak_memory_gib": cost.get("perf/peak_memory_gib"),
            "best_val_miou": progress.best,
            "headline": self.method.headline,
            "tested": tested,
            "test": None if evaluation is None else evaluation.as_record(),
            "unlabelled": self._unlabelled or None,
            "dataset": self.dataset.digest,
            "weights_sha256": progress.weights,
            "strategy": self.parallel.strategy,
            "world_size": self.parallel.world,
            "device": str(self.parallel.device),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("dctc", "torch", "accelerate", "mlflow", "rasterio", "numpy")},
        }
        path = self.folder / "report.json"
        if self.parallel.is_main:
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(record, indent=1) + "\n")
            draft.replace(path)
        return path

    def draw(self, step: int) -> dict[str, Path]:
        """Image, label, every net's prediction and the headline's entropy for the same tiles each time (main rank)."""
        file = self._look_at_tiles(draw_panels, self.folder / "pictures" / f"step-{step:08d}.png")
        return {} if file is None else {"pictures": file}

    def save_tiles(self) -> Path | None:
        """The same tiles with what each net says of them at the end, for panels of several runs (main rank)."""
        return self._look_at_tiles(save_tiles, self.folder / "tiles.npz")

    def _look_at_tiles(self, write: Callable[..., Path], file: Path) -> Path | None:
        if not len(self.rows["pictures"]):
            return None
        alone = Layout()
        batches = evaluation_batches(
            self.dataset, self.rows["pictures"], self.batch, alone, self._normaliser(), substitute=self.substitute
        )
        with self._looking():
            if not self.parallel.is_main:  # parts that are sharded need all ranks for each forward pass
                for (images, _, _), _ in batches:
                    self._logits(images)
                return None
            return write(self._logits, batches, self.dataset.manifest, file, self.method.headline)

    def survey(self, wanted: Survey) -> Tensor:
        """The sum of what a method counts over all unlabelled tiles, over all ranks."""
        total: Tensor | None = None
        with self._looking(), self.precision.autocast():
            for (images, valid, _), _ in self._batches(self.rows["unlabelled"], self.substitute):
                images = images.contiguous(memory_format=self.precision.memory_format)
                counts = wanted.of(Batch(images, valid))
                total = counts if total is None else total + counts
        if total is None:
            raise InputError(f"{self.dataset.location}: no unlabelled tile to look at")
        return self.parallel.sum(total)

    def _evaluate(
        self, rows: Indices, autocast: AbstractContextManager[object], substitute: bool = False
    ) -> Evaluation:
        with self._looking(), autocast:
            return evaluate_tiles(
                self._logits,
                self._batches(rows, substitute),
                self.dataset.manifest.class_names,
                self.parallel.device,
                self.parallel.sum,
                self.method.temperature,
            )

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Evaluation mode without gradients, and without compiling anything for shapes that training never sees."""
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with inference(*self.method.parts.values()), eager:
            yield

    def _batches(self, rows: Indices, substitute: bool) -> Iterator[tuple[DeviceBatch, RawBatch]]:
        return evaluation_batches(
            self.dataset, rows, self.batch, self.layout, self._normaliser(), self.workers, substitute
        )

    def _normaliser(self) -> Normaliser:
        return Normaliser.of(self.dataset.manifest, self.parallel.device)

    def _logits(self, images: Tensor) -> dict[str, Tensor]:
        return self.method.logits(images.contiguous(memory_format=self.precision.memory_format))

    def _probe(self, progress: Progress) -> dict[str, float]:
        """Entropy, agreement, predicted class shares on unlabelled tiles; their quality where labels are held."""
        evaluation = self._evaluate(self.rows["probe"], self.precision.autocast(), self.substitute)
        metrics: dict[str, float] = {}
        for name, net in evaluation.nets.items():
            metrics[f"train/entropy/{name}"] = net.entropy
            quality = net.pseudo_metrics(prefix := f"train/pseudo/{name}")
            metrics |= quality
            for label, share in zip(self.dataset.manifest.class_names, net.predicted, strict=True):
                metrics[f"train/share/{name}/{label}"] = share
            dying = self._dying_classes(net.predicted)
            metrics[f"train/dying/{name}"] = float(len(dying))
            found = {key.removeprefix(f"{prefix}/"): value for key, value in quality.items() if math.isfinite(value)}
            self._unlabelled[name] = {"pseudo_labels": found or None, "dying": sorted(dying)}
            if progress.rounds >= self.warn_from and name != "mean":
                self._warn_of(name, dying, net.predicted)
        names = self.dataset.manifest.class_names
        metrics |= {f"train/share/labels/{n}": float(s) for n, s in zip(names, self._labelled_shares(), strict=True)}
        if evaluation.agreement is not None:
            metrics["train/agreement"] = evaluation.agreement
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    def _dying_classes(self, predicted: list[float]) -> set[str]:
        """Names of the classes that a net predicts in far fewer pixels than the labels have."""
        if not any(predicted):  # not a pixel with data was looked at
            return set()
        shares = zip(self.dataset.manifest.class_names, self._labelled_shares(), predicted, strict=True)
        return {label for label, share, seen in shares if share >= DYING_FROM and seen < DYING_BELOW * share}

    def _warn_of(self, net: str, dying: set[str], predicted: list[float]) -> None:
        """Say once by name that a net hardly predicts a class any more, and once that it does again."""
        shares = self._labelled_shares()
        for label, share, seen in zip(self.dataset.manifest.class_names, shares, predicted, strict=True):
            if label in dying and (net, label) not in self._dying:
                self._dying.add((net, label))
                self.warn(
                    f"class {label!r} is dying in {net}: {seen:.2%} of the unlabelled pixels, {share:.2%} of the labels"
                )
            elif label not in dying and (net, label) in self._dying:
                self._dying.discard((net, label))
                self.warn(f"class {label!r} is back in {net}: {seen:.2%} of the unlabelled pixels")

    def _labelled_shares(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Class shares of (a sample of) the labels in use, not of those that are held back."""
        if self._label_shares is None:
            rows = self.rows["labelled"]
            tiles = TileDataset(self.dataset, labels=True, selection=rows if self.substitute else None)
            counts = np.zeros(IGNORE + 1, np.int64)
            for row in rows[:: max(1, len(rows) // 256)]:
                counts += np.bincount(tiles[0, int(row)]["labels"].numpy().ravel(), minlength=IGNORE + 1)
            counted = counts[: len(self.dataset.manifest.classes)]
            self._label_shares = counted / max(1, counted.sum())
        return self._label_shares
