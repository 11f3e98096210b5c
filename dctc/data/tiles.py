"""Tiles by index row: positioned reads from the tar shards, checked by crc, decoded into one batch."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info
from zlib_ng import zlib_ng

from shards.codec import read_image, read_label
from shards.errors import AccessError, InputError
from shards.index import Index
from shards.manifest import IGNORE, Dataset

TAR_BLOCK = 512
OPEN_SHARDS = 128  # of a local dataset, in each process; a usual limit on open files is 1024


class RawBatch(TypedDict):
    """What a loader yields, on the host.

    ``images`` [B,bands,H,W] in the dataset's dtype, ``valid`` bool [B,H,W], ``labels`` uint8 [B,H,W] (empty [0] when
    they were not asked for), ``positions`` int64 [B] in the stream, ``rows`` int64 [B] in the index (-1 = padding),
    ``damaged`` int64 [B]: the row that was to be read where another had to stand in for it, else -1.
    """

    images: Tensor
    valid: Tensor
    labels: Tensor
    positions: Tensor
    rows: Tensor
    damaged: Tensor


class TileDataset(TorchDataset[RawBatch]):
    """Map-style dataset whose items are whole batches: ``__getitems__`` of ``(position, row)`` pairs.

    A row of -1 is padding: nothing is read, nothing in it is valid. Shards of a remote dataset stay open, and so in the
    node's cache, for one batch; those of a folder until :data:`OPEN_SHARDS` others have been used since.

    Args:
        dataset: an opened dataset; whoever got the rows from its index has had the index's hashes checked.
        labels: read the labels too; False never touches them, so the unlabelled stream cannot leak one.
        selection: None: a damaged tile is an error. Else the next row of ``selection``, int64 [N], after the damaged
            one that reads well stands in for it, after the last one the first. A server that is away is no damage.
    """

    def __init__(self, dataset: Dataset, labels: bool, selection: NDArray[np.int64] | None = None) -> None:
        self.dataset = dataset
        self.labels = labels
        self.selection = selection
        self.index = Index.open(dataset, hashed=False)
        self._files: OrderedDict[int, FileIO] = OrderedDict()  # by last use; they close with this object

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:  # descriptors and memory maps do not travel
        return {"dataset": self.dataset, "labels": self.labels, "selection": self.selection}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the state is the constructor's arguments

    def __getitem__(self, item: tuple[int, int]) -> RawBatch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> RawBatch:
        """Read and decode a batch; raises :class:`InputError` naming shard, offset and key of a damaged tile."""
        manifest = self.dataset.manifest
        size = manifest.tile_size
        batch = _room(len(items), len(manifest.bands), size, np.dtype(manifest.dtype), self.labels)
        images, valid, labels = (tensor.numpy() for tensor in batch)
        positions, rows = np.array(items, np.int64).reshape(-1, 2).T.copy()
        damaged = np.full(len(items), -1, np.int64)
        for slot, row in enumerate(rows.tolist()):
            if row < 0:
                images[slot], valid[slot] = 0, False
                if self.labels:
                    labels[slot] = IGNORE
                continue
            rows[slot] = self._read(row, images[slot], valid[slot], labels[slot] if self.labels else None)
            if rows[slot] != row:
                damaged[slot] = row
        if self.dataset.store is not None:
            self._close(keep=0)
        return RawBatch(
            images=batch[0],
            valid=batch[1],
            labels=batch[2],
            positions=torch.from_numpy(positions),
            rows=torch.from_numpy(rows),
            damaged=torch.from_numpy(damaged),
        )

    def key(self, row: int) -> str:
        """The tile's key, from the header of its image member; its row where the shard ends before that."""
        header = self._pread(row, int(self.index.image_offset[row]) - TAR_BLOCK, TAR_BLOCK)
        return header[:100].rstrip(b"\0").decode("ascii", "replace").split(".")[0] or f"of row {row}"

    def shard(self, row: int) -> str:
        """The tile's shard, as errors name it."""
        return self.dataset.shard_name(int(self.index.shard[row]))

    def _read(self, row: int, image: NDArray[Any], valid: NDArray[np.bool_], label: NDArray[np.uint8] | None) -> int:
        """Fill one slot; the row that it holds then."""
        first: InputError | None = None
        for candidate in self._candidates(row):
            problem = self._damage(candidate, image, valid, label)
            if problem is not None and self.dataset.store is not None:
                self._renew(candidate)
                problem = self._damage(candidate, image, valid, label)
            if problem is None:
                return candidate
            if self.selection is None:
                raise problem
            first = first or problem
        raise InputError(f"{first}; and no other tile of the selection reads well")

    def _damage(
        self, row: int, image: NDArray[Any], valid: NDArray[np.bool_], label: NDArray[np.uint8] | None
    ) -> InputError | None:
        """Decode into the slot; what is wrong with the tile. A file or server that cannot be reached is no damage."""
        if self.dataset.store is not None:
            self._file(row)
        try:
            self._decode(row, image, valid, label)
        except AccessError:
            raise
        except InputError as error:
            return error
        return None

    def _renew(self, row: int) -> None:
        """See to it that the node's copy of a remote shard is the server's: other nodes read what that has."""
        shard = int(self.index.shard[row])
        self._files.pop(shard).close()
        self.dataset.discard_damaged_shard(shard)

    def _candidates(self, row: int) -> Iterator[int]:
        yield row
        if self.selection is not None:
            place = int(np.flatnonzero(self.selection == row)[0])
            yield from np.roll(self.selection, -place)[1:].tolist()

    def _decode(self, row: int, image: NDArray[Any], valid: NDArray[np.bool_], label: NDArray[np.uint8] | None) -> None:
        codec = self.dataset.manifest.codec
        data = self._member(row, "image")
        mask = self._member(row, "mask") if self.index.mask_size[row] else None
        try:
            read_image(codec["image"], data, mask, image, valid)
            if label is None:
                return
            if self.index.label_size[row]:
                read_label(codec["label"], self._member(row, "label"), label)
            else:
                label[...] = IGNORE
        except AccessError:
            raise
        except InputError as error:
            if self.dataset.location in str(error):
                raise
            offset = int(self.index.image_offset[row])
            raise InputError(f"{self.shard(row)}: tile {self.key(row)} at offset {offset}: {error}") from None

    def _member(self, row: int, member: str) -> bytes:
        offset = int(getattr(self.index, f"{member}_offset")[row])
        size = int(getattr(self.index, f"{member}_size")[row])
        data = self._pread(row, offset, size)
        if len(data) != size or zlib_ng.crc32(data) != int(getattr(self.index, f"{member}_crc32")[row]):
            raise InputError(
                f"{self.shard(row)}: the {member} of tile {self.key(row)} at offset {offset} is damaged "
                f"(crc32 differs); {self._remedy()}"
            )
        return data

    def _remedy(self) -> str:
        if self.dataset.store is not None:
            return "the shard is as its manifest says, so the dataset was damaged before: pack it again"
        return f"run `dctc verify {self.dataset.root}`, and pack the dataset again with --fresh"

    def _pread(self, row: int, offset: int, size: int) -> bytes:
        file = self._file(row)
        try:
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise AccessError(
                f"{self.shard(row)}: {size} bytes at offset {offset}, of row {row}, cannot be read ({error.strerror})"
            ) from None

    def _file(self, row: int) -> FileIO:
        shard = int(self.index.shard[row])
        if shard not in self._files:
            self._close(keep=OPEN_SHARDS - 1)
            self._files[shard] = self.dataset.open_shard(shard)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _close(self, keep: int) -> None:
        while len(self._files) > keep:
            self._files.popitem(last=False)[1].close()


def _room(count: int, bands: int, size: int, dtype: np.dtype[Any], labelled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Images, validity and labels of a batch, not yet filled, in one block of memory.

    A large block lies on huge pages (numpy asks for them), which saves most page faults; that of a loader's worker lies
    in shared memory, so that the batch is handed over without a copy.
    """
    pixels = count * size * size
    ends = np.cumsum([pixels * bands * dtype.itemsize, pixels, pixels * labelled]).tolist()
    if get_worker_info() is None:
        block = torch.from_numpy(np.empty(ends[-1], np.uint8))
    else:
        # As torch's own collate function does it; there is no public way, and no types.
        storage = torch.UntypedStorage._new_shared(ends[-1])  # type: ignore[no-untyped-call]
        block = torch.empty(0, dtype=torch.uint8).set_(storage)
    images = block[: ends[0]].view(torch.from_numpy(np.empty(0, dtype)).dtype)
    shape = (count, size, size)
    return (
        images.view(count, bands, size, size),
        block[ends[0] : ends[1]].view(torch.bool).view(shape),
        block[ends[1] :].view(shape if labelled else (0,)),
    )
