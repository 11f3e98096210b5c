"""What is done before a batch is asked for: its shards fetched from afar, its tensors copied to the device."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.errors import InputError

if TYPE_CHECKING:  # so that copies to a device can be timed where nothing reads shards
    from dctc.data.tiles import RawBatch
    from shards.manifest import Dataset

AHEAD = 256  # batches whose shards are fetched before they are asked for
MOST_PINS = 64  # open files of one look-ahead; a usual limit of a process is 1024
_Batch = TypeVar("_Batch", bound=tuple[object, ...])  # of tensors, None, and tuples of tensors


class LookAhead:
    """Fetches the shards of coming batches into the node's cache, from a thread, and pins them until they are read.

    All look-aheads of a node (two streams and a validation have one each, on every rank) pin at most three quarters of
    the cache's limit, so that they cannot crowd out what is being read. A fetch that fails ends it: who reads the tile
    meets the same error and says so.
    For a dataset in a folder it does nothing.

    Args:
        shards: index column ``shard``.
        batches: of (position, row), as the loader's sampler yields them.
    """

    def __init__(
        self, dataset: Dataset, shards: NDArray[np.uint32], batches: Iterable[Sequence[tuple[int, int]]]
    ) -> None:
        self._dataset, self._shards, self._batches = dataset, shards, batches
        self._delivered, self._stopped = 0, dataset.store is None
        self._changed = threading.Condition()
        self._pins: dict[int, tuple[FileIO, int]] = {}  # shard -> open file, the last batch known to need it

    def __enter__(self) -> LookAhead:
        if not self._stopped:
            threading.Thread(target=self._run, name="look-ahead", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def delivered(self) -> None:
        """One more batch has come out of the loader."""
        with self._changed:
            self._delivered += 1
            self._changed.notify()

    def _run(self) -> None:
        try:
            for number, batch in enumerate(self._batches):
                for shard in dict.fromkeys(int(self._shards[row]) for _, row in batch if row >= 0):
                    if not self._wait_for_room(number, shard):
                        return
                    file = self._pins[shard][0] if shard in self._pins else self._dataset.open_shard(shard)
                    self._pins[shard] = (file, number)
            with self._changed:  # the last ones are pinned until they are read, too
                while not self._stopped and self._delivered <= max(
                    (last for _, last in self._pins.values()), default=-1
                ):
                    self._changed.wait()
        except (InputError, OSError):
            return
        finally:
            for file, _ in self._pins.values():
                file.close()

    def _wait_for_room(self, number: int, shard: int) -> bool:
        """Wait until batch ``number`` is near and its shard may be pinned; False when it is no longer wanted."""
        assert self._dataset.store is not None
        budget = self._dataset.store.limit // (4 * _ranks_of_this_node())
        sizes = self._dataset.manifest.shards
        with self._changed:
            while not self._stopped:
                for known, (file, last) in list(self._pins.items()):
                    if last < self._delivered:
                        file.close()
                        del self._pins[known]
                pinned = sum(sizes[known].bytes for known in self._pins)
                room = len(self._pins) < MOST_PINS and pinned + sizes[shard].bytes <= budget
                fits = shard in self._pins or not self._pins or room
                if fits and number < self._delivered + AHEAD:
                    return True
                self._changed.wait()
        return False


def _ranks_of_this_node() -> int:
    """As torchrun and accelerate tell each process that they start."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class CopyAhead(Generic[_Batch]):
    """Rounds of host batches to rounds of device batches, in their order.

    On a GPU the next round is copied and prepared on a stream of its own while the current one is computed on; on CPU
    each round is prepared when it is asked for.

    Args:
        prepare: one host batch to its tensors on ``device``; its copies should not block.
    """

    def __init__(self, prepare: Callable[[RawBatch], _Batch], device: torch.device) -> None:
        self._prepare, self._device = prepare, device
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
            self._side.wait_stream(torch.cuda.current_stream(device))  # for the constants that ``prepare`` uses

    def __call__(self, rounds: Iterable[Sequence[RawBatch]]) -> Iterator[list[_Batch]]:
        """The rounds on the device."""
        if self._side is None:
            for raws in rounds:
                yield [self._prepare(raw) for raw in raws]
            return
        under_way: deque[tuple[list[_Batch], torch.cuda.Event]] = deque()
        for raws in rounds:
            under_way.append(self._start(raws, self._side))
            if len(under_way) > 1:
                yield self._hand_over(*under_way.popleft())
        while under_way:
            yield self._hand_over(*under_way.popleft())

    def _start(self, raws: Sequence[RawBatch], side: torch.cuda.Stream) -> tuple[list[_Batch], torch.cuda.Event]:
        with torch.cuda.stream(side):
            batches = [self._prepare(raw) for raw in raws]
            return batches, side.record_event()

    def _hand_over(self, batches: list[_Batch], copied: torch.cuda.Event) -> list[_Batch]:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in _tensors(batches):
            tensor.record_stream(current)  # or the allocator might reuse it while this stream still reads it
        return batches


def _tensors(nested: object) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _tensors(item)
