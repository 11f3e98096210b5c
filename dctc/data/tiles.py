"""Tiles by index row: positioned reads from the tar shards, checked by crc, decoded into one batch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from io import FileIO
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from shards.codec import read_image, read_label
from shards.errors import InputError
from shards.index import Index
from shards.manifest import IGNORE, Dataset

TAR_BLOCK = 512


class RawBatch(TypedDict):
    """What a loader yields, on the host.

    ``images`` [B,bands,H,W] in the dataset's dtype, ``valid`` bool [B,H,W], ``labels`` uint8 [B,H,W] (empty [0] when
    they were not asked for), ``positions`` int64 [B] in the stream, ``rows`` int64 [B] in the index (-1 = padding).
    """

    images: Tensor
    valid: Tensor
    labels: Tensor
    positions: Tensor
    rows: Tensor


class TileDataset(TorchDataset[RawBatch]):
    """Map-style dataset whose items are whole batches: ``__getitems__`` of ``(position, row)`` pairs.

    A row of -1 is padding: nothing is read, nothing in it is valid.

    Args:
        dataset: an opened dataset folder.
        labels: read the labels too; False never touches them, so the unlabelled stream cannot leak one.
    """

    def __init__(self, dataset: Dataset, labels: bool) -> None:
        self.dataset = dataset
        self.labels = labels
        self.index = Index.open(dataset)
        self._files: dict[int, FileIO] = {}  # shards opened by this process; they close with this object

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return {"dataset": self.dataset, "labels": self.labels}  # descriptors and memory maps do not travel

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the state is the constructor's arguments

    def __getitem__(self, item: tuple[int, int]) -> RawBatch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> RawBatch:
        """Read and decode a batch; raises :class:`InputError` naming shard, offset and key of a damaged tile."""
        manifest = self.dataset.manifest
        size = manifest.tile_size
        images = np.zeros((len(items), len(manifest.bands), size, size), manifest.dtype)
        valid = np.zeros((len(items), size, size), bool)
        labels = np.full((len(items), size, size) if self.labels else (0,), IGNORE, np.uint8)
        for slot, (_, row) in enumerate(items):
            if row < 0:
                continue
            mask = self._read(row, "mask") if self.index.mask_size[row] else None
            read_image(manifest.codec["image"], self._read(row, "image"), mask, images[slot], valid[slot])
            if self.labels and self.index.label_size[row]:
                read_label(manifest.codec["label"], self._read(row, "label"), labels[slot])
        positions, rows = np.array(items, np.int64).reshape(-1, 2).T.copy()
        return RawBatch(
            images=torch.from_numpy(images),
            valid=torch.from_numpy(valid),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
            rows=torch.from_numpy(rows),
        )

    def key(self, row: int) -> str:
        """The tile's key, from the header of its image member."""
        header = self._pread(row, int(self.index.image_offset[row]) - TAR_BLOCK, TAR_BLOCK)
        return header[:100].rstrip(b"\0").decode("ascii", "replace").split(".")[0]

    def _read(self, row: int, member: str) -> bytes:
        offset = int(getattr(self.index, f"{member}_offset")[row])
        size = int(getattr(self.index, f"{member}_size")[row])
        data = self._pread(row, offset, size)
        if len(data) != size or zlib.crc32(data) != int(getattr(self.index, f"{member}_crc32")[row]):
            raise InputError(
                f"{self._shard(row)}: the {member} of tile {self.key(row)} at offset {offset} is damaged "
                f"(crc32 differs); run `dctc verify {self.dataset.root}` and pack the dataset again"
            )
        return data

    def _shard(self, row: int) -> str:
        return str(self.dataset.root / self.dataset.manifest.shards[int(self.index.shard[row])].name)

    def _pread(self, row: int, offset: int, size: int) -> bytes:
        shard = int(self.index.shard[row])
        if shard not in self._files:
            path = self._shard(row)
            try:
                self._files[shard] = FileIO(path)
            except OSError as error:
                raise InputError(f"{path}: cannot be opened ({error.strerror}); pack the dataset again") from None
        return os.pread(self._files[shard].fileno(), size, offset)
