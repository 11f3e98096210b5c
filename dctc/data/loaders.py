"""Loaders of the two training streams and of evaluation, and the way of a batch to the device.

The loaders are never handed to ``accelerator.prepare``: it would shard again what the sampler has already cut.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dctc.data.augment import Kind, View
from dctc.data.order import Indices, Layout, RankBatchSampler
from dctc.data.tiles import RawBatch, TileDataset
from shards.manifest import IGNORE, Dataset, Manifest

Loader = DataLoader[RawBatch]
DeviceBatch = tuple[Tensor, Tensor, Tensor | None]
"""Normalised images float32 [B,bands,H,W], valid bool [B,H,W], labels int64 [B,H,W] or None."""


def _loader(tiles: TileDataset, batches: object, workers: int, pin: bool) -> Loader:
    return DataLoader(
        tiles,
        batch_sampler=batches,  # type: ignore[arg-type]  # (position, row) pairs: wider than the stub's list[int]
        num_workers=workers,
        collate_fn=_whole,  # type: ignore[arg-type]  # __getitems__ has already made the batch
        pin_memory=pin,
        multiprocessing_context="forkserver" if workers else None,  # fork would copy the tracker's threads and locks
        worker_init_fn=_leave_signals_to_the_trainer if workers else None,
    )


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach the whole group; a worker that dies of one would spoil the checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _whole(batch: RawBatch) -> RawBatch:
    return batch


@dataclass(frozen=True)
class Normaliser:
    """Raw tiles to network input: ``(x - mean) / std`` a band, float32, on ``device``; pixels without data become 0."""

    mean: Tensor  # float32 [bands,1,1]
    std: Tensor

    @classmethod
    def of(cls, manifest: Manifest, device: torch.device) -> Normaliser:
        """The statistics of a dataset's training split."""
        return cls.from_values([b.mean for b in manifest.bands], [b.std for b in manifest.bands], device)

    @classmethod
    def from_values(cls, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Normaliser:
        """Means and standard deviations a band; a band that never varies is divided by 1."""
        spread = torch.tensor([s or 1.0 for s in std], dtype=torch.float32, device=device)
        centre = torch.tensor(list(mean), dtype=torch.float32, device=device)
        return cls(centre[:, None, None], spread[:, None, None])

    def __call__(self, images: Tensor, valid: Tensor) -> Tensor:
        """Images [B,bands,H,W] of any real dtype and ``valid`` [B,H,W] to float32 [B,bands,H,W]."""
        return torch.where(valid[:, None], (images.float() - self.mean) / self.std, 0.0)


@dataclass(frozen=True)
class TrainingStream:
    """One of the two endless streams of a rank: for each round, the list of its micro-batches.

    Attributes:
        number: 0 labelled, 1 unlabelled (``dctc.data.order``).
        rows: index rows of the selected tiles.
        batch: global batch size.
        augment: how each sample is viewed.
    """

    dataset: Dataset
    number: int
    rows: Indices
    batch: int
    seed: int
    layout: Layout
    augment: Kind
    workers: int
    labels: bool

    def __post_init__(self) -> None:
        self._sampler(range(0))  # a batch that does not divide, or too few tiles, is refused now

    def _sampler(self, rounds: range) -> RankBatchSampler:
        return RankBatchSampler(self.rows, self.batch, rounds, self.seed, self.number, self.layout)

    def batches(self, rounds: range, device: torch.device) -> Iterator[list[DeviceBatch]]:
        """The micro-batches of each round of ``rounds``, on ``device``."""
        tiles = TileDataset(self.dataset, self.labels)
        loader = iter(_loader(tiles, self._sampler(rounds), self.workers, device.type == "cuda"))
        normaliser = Normaliser.of(self.dataset.manifest, device)
        for _ in rounds:
            yield [self._to_device(raw, normaliser, device) for raw in islice(loader, self.layout.accumulation)]

    def _to_device(self, raw: RawBatch, normaliser: Normaliser, device: torch.device) -> DeviceBatch:
        images, valid, labels = (raw[k].to(device, non_blocking=True) for k in ("images", "valid", "labels"))
        truth = torch.where(valid, labels.long(), IGNORE) if self.labels else None
        view = View(self.augment, self.seed, self.number)
        return view(normaliser(images, valid), valid, truth, raw["positions"])


def evaluation_rows(rows: Indices, batch: int, layout: Layout) -> list[Indices]:
    """This rank's batches of ``rows``: each tile once over all ranks, every batch full, padded with row -1.

    All ranks get the same number of batches, so that collective calls inside an evaluation cannot hang.
    """
    whole = batch * layout.world
    padded = np.full(-(-len(rows) // whole) * whole, -1, np.int64)
    padded[: len(rows)] = rows
    return list(padded.reshape(-1, layout.world, batch)[:, layout.rank])


def evaluation_batches(
    dataset: Dataset, rows: Indices, batch: int, layout: Layout, normaliser: Normaliser, workers: int = 0
) -> Iterator[tuple[DeviceBatch, RawBatch]]:
    """Batches with labels for evaluation, and the raw batch beside each (for pictures and keys)."""
    device = normaliser.mean.device
    batches = [[(0, int(row)) for row in group] for group in evaluation_rows(rows, batch, layout)]
    for raw in _loader(TileDataset(dataset, labels=True), batches, workers, device.type == "cuda"):
        images, valid, labels = (raw[key].to(device, non_blocking=True) for key in ("images", "valid", "labels"))
        yield (normaliser(images, valid), valid, torch.where(valid, labels.long(), IGNORE)), raw
