"""Loaders of the two training streams and of evaluation, and the way of a batch to the device.

The loaders are never handed to ``accelerator.prepare``: it would shard again what the sampler has already cut.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import islice
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from dctc.data.ahead import CopyAhead, LookAhead
from dctc.data.augment import BoxSpec, Kind, View, box_masks, cutmix_masks, mix, partners, sample_keys
from dctc.data.order import BlockOrder, GlobalOrder, Indices, Layout, Order, RankBatchSampler
from dctc.data.tiles import RawBatch, TileDataset
from shards.errors import InputError
from shards.index import Index
from shards.lifetime import leave_with_parent
from shards.manifest import IGNORE, Dataset, Manifest

Loader = DataLoader[RawBatch]
DeviceBatch = tuple[Tensor, Tensor, Tensor | None]
"""Normalised images float32 [B,bands,H,W], valid bool [B,H,W], labels int64 [B,H,W] or None."""


class StreamBatch(NamedTuple):
    """A micro-batch of a training stream on the device; the fields are those of :class:`dctc.methods.base.Batch`."""

    images: Tensor
    valid: Tensor
    labels: Tensor | None
    views: tuple[Tensor, ...] = ()
    view_valid: tuple[Tensor, ...] = ()
    boxes: Tensor | None = None
    partner: Tensor | None = None
    keys: tuple[int, ...] = ()


PREFETCH = 2  # batches that each worker holds ready


def _loader(tiles: TileDataset, batches: object, workers: int, prefetch: int, pin: bool) -> Loader:
    return DataLoader(
        tiles,
        batch_sampler=batches,  # type: ignore[arg-type]  # (position, row) pairs: wider than the stub's list[int]
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_whole,  # type: ignore[arg-type]  # __getitems__ has already made the batch
        pin_memory=pin,
        multiprocessing_context=_fork_server() if workers else None,
        worker_init_fn=_prepare_worker if workers else None,
    )


@contextmanager
def _reading(loader: Loader) -> Iterator[Iterator[RawBatch]]:
    """The loader's batches. Its workers end with the block; where torch leaves them to the garbage collector, which may
    have ended their queues before, that waits for some seconds and gives up."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public way


@cache
def _fork_server() -> ForkServerContext:
    """Where workers come from: a fork of the trainer would copy the tracker's threads and locks.

    The server imports once what each worker needs, for some seconds, so that workers start in no time. Whoever ends
    with batches still open ends with their workers: multiprocessing would wait for them, and they heed no SIGTERM.
    """
    atexit.register(_end_workers)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _end_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon and isinstance(process, ForkServerProcess):
            process.kill()


def _prepare_worker(_: int) -> None:
    """Leave signals to the trainer, and end with it.

    Ctrl-C and a scheduler's signals reach the whole group; a worker that dies of one would spoil the checkpoint.
    """
    leave_with_parent()
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
        cutmix: mix each sample with the other one of its pair; labelled streams only.
        order, mix: the kind of order, and the shards that order "block" shuffles together.
        substitute: read another tile of ``rows`` in place of a damaged one (:class:`TileDataset`), saying so once.
        prefetch: batches that each worker holds ready.
        views, view_kind: photometric views of each sample beside the image itself.
        photometry: the amount of photometry of all that is ``strong``.
        boxes: CutMix boxes for the method to mix with, drawn for each view; None where it needs none.
        numbered: give each sample a random number.
        damaged: the damaged rows met so far.
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
    order: Literal["global", "block"] = "global"
    mix: int = 64
    substitute: bool = False
    prefetch: int = PREFETCH
    cutmix: bool = False
    views: int = 0
    view_kind: Literal["strong", "noise"] = "strong"
    photometry: float = 1.0
    boxes: BoxSpec | None = None
    numbered: bool = False
    damaged: set[int] = field(default_factory=set, compare=False)

    def __post_init__(self) -> None:
        self._sampler(range(0))  # a batch that does not divide, or too few tiles, is refused now
        each = self.batch // (self.layout.world * self.layout.accumulation)
        if (self.cutmix or self.boxes is not None) and each % 2:
            who = "data.cutmix" if self.cutmix else "the method's CutMix"
            batch = "data.batch_labelled" if self.labels else "data.batch_unlabelled"
            raise InputError(
                f"{who} pairs the tiles of a micro-batch, and {each} is odd: make {batch} an even multiple of "
                "processes x parallel.accumulation"
            )

    @cached_property
    def _order(self) -> Order:
        if self.order == "global":
            return GlobalOrder(len(self.rows), self.seed, self.number)
        return BlockOrder(self._shards[self.rows], self.seed, self.number, self.mix)

    @cached_property
    def _shards(self) -> NDArray[np.uint32]:
        return Index.open(self.dataset, hashed=False).shard

    def _sampler(self, rounds: range) -> RankBatchSampler:
        return RankBatchSampler(self.rows, self._order, self.batch, rounds, self.layout)

    def keys(self, step: int) -> list[str]:
        """The keys of this rank's tiles in round ``step`` (from 0), as they were meant before any stand-in."""
        tiles = TileDataset(self.dataset, self.labels)
        return [_key(tiles, row) for batch in self._sampler(range(step, step + 1)) for _, row in batch]

    def batches(self, rounds: range, device: torch.device) -> Iterator[list[StreamBatch]]:
        """The micro-batches of each round of ``rounds``, on ``device``."""
        tiles = TileDataset(self.dataset, self.labels, self.rows if self.substitute else None)
        sampler = self._sampler(rounds)
        prepare = partial(self._to_device, normaliser=Normaliser.of(self.dataset.manifest, device), device=device)
        loader = _loader(tiles, sampler, self.workers, self.prefetch, device.type == "cuda")
        with LookAhead(self.dataset, self._shards, sampler) as ahead, _reading(loader) as read:
            watched = self._watched(read, tiles, ahead)
            raws = (list(islice(watched, self.layout.accumulation)) for _ in rounds)
            yield from CopyAhead(prepare, device)(raws)

    def _watched(self, batches: Iterator[RawBatch], tiles: TileDataset, ahead: LookAhead) -> Iterator[RawBatch]:
        """The batches; the look-ahead and the user learn of what came."""
        for raw in batches:
            ahead.delivered()
            for row, stand_in in zip(raw["damaged"].tolist(), raw["rows"].tolist(), strict=True):
                if row >= 0 and row not in self.damaged:
                    self.damaged.add(row)
                    print(
                        f"warning: {tiles.shard(row)}: tile {_key(tiles, row)} is damaged, {_key(tiles, stand_in)} "
                        f"stands in for it from now on; {len(self.damaged)} damaged in this stream so far",
                        flush=True,
                    )
            yield raw

    def _to_device(self, raw: RawBatch, *, normaliser: Normaliser, device: torch.device) -> StreamBatch:
        images, valid, labels = (raw[k].to(device, non_blocking=True) for k in ("images", "valid", "labels"))
        truth = torch.where(valid, labels.long(), IGNORE) if self.labels else None
        view, positions = View(self.augment, self.seed, self.number, photometry=self.photometry), raw["positions"]
        placed, seen, truth = view.place(normaliser(images, valid), valid, truth, positions)
        images, valid = view.colour(placed, seen, positions)
        if truth is not None and self.augment == "strong":
            truth = torch.where(valid, truth, IGNORE)
        others = [
            View(self.view_kind, self.seed, self.number, k + 1, photometry=self.photometry) for k in range(self.views)
        ]
        shown = [other.colour(placed, seen, positions) for other in others]
        partner = None
        if self.cutmix or self.boxes is not None:
            partner = partners(len(images), device)
        if self.cutmix and truth is not None and partner is not None:
            masks = cutmix_masks(self.seed, self.number, positions, raw["rows"], images.shape[-1], device)
            images, valid, truth = (mix(tensor, masks, partner) for tensor in (images, valid, truth))
            shown = [(mix(image, masks, partner), mix(mask, masks, partner)) for image, mask in shown]
        boxes = None if self.boxes is None else self._boxes(self.boxes, raw, images.shape[-1], device)
        views, view_valid = (tuple(pair[k] for pair in shown) for k in (0, 1))
        keys = sample_keys(self.seed, self.number, positions) if self.numbered else ()
        return StreamBatch(images, valid, truth, views, view_valid, boxes, partner, keys)

    def _boxes(self, spec: BoxSpec, raw: RawBatch, size: int, device: torch.device) -> Tensor:
        """bool [views or 1,B,size,size]."""
        return torch.stack(
            [
                box_masks(spec, (self.seed, self.number, view), raw["positions"], raw["rows"], size, device)
                for view in range(max(1, self.views))
            ]
        )


def _key(tiles: TileDataset, row: int) -> str:
    """The tile's key, or its row where even the header cannot be read."""
    try:
        return tiles.key(row)
    except InputError:
        return f"of row {row}"


def evaluation_rows(rows: Indices, batch: int, layout: Layout) -> list[Indices]:
    """This rank's batches of ``rows``: each tile once over all ranks, every batch full, padded with row -1.

    All ranks get the same number of batches, so that collective calls inside an evaluation cannot hang.
    """
    whole = batch * layout.world
    padded = np.full(-(-len(rows) // whole) * whole, -1, np.int64)
    padded[: len(rows)] = rows
    return list(padded.reshape(-1, layout.world, batch)[:, layout.rank])


def evaluation_batches(
    dataset: Dataset,
    rows: Indices,
    batch: int,
    layout: Layout,
    normaliser: Normaliser,
    workers: int = 0,
    substitute: bool = False,
) -> Iterator[tuple[DeviceBatch, RawBatch]]:
    """Batches with labels for evaluation, and the raw batch beside each (for pictures and keys).

    The rows of a remote dataset are read shard by shard, so that each shard is needed in one stretch. With
    ``substitute`` another one of ``rows`` is read in place of a damaged tile: for looking on, never for scores.
    """
    device = normaliser.mean.device
    tiles = TileDataset(dataset, labels=True, selection=rows if substitute else None)
    if dataset.store is not None:
        rows = rows[np.argsort(tiles.index.shard[rows], kind="stable")]
    batches = [[(0, int(row)) for row in group] for group in evaluation_rows(rows, batch, layout)]
    loader = _loader(tiles, batches, workers, PREFETCH, device.type == "cuda")
    with LookAhead(dataset, tiles.index.shard, batches) as ahead, _reading(loader) as read:
        for raw in read:
            ahead.delivered()
            images, valid, labels = (raw[key].to(device, non_blocking=True) for key in ("images", "valid", "labels"))
            yield (normaliser(images, valid), valid, torch.where(valid, labels.long(), IGNORE)), raw
