"""The order of training tiles as a pure function (no state, no rank, no worker in it).

``O_e`` is a permutation of the selected tiles keyed by (seed, stream, epoch); a stream is ``O_0 ++ O_1 ++ ...``. Round
s uses stream positions ``[s*G, (s+1)*G)`` of a global batch of G, whoever reads them. Raw Philox words are part of the
algorithm's definition, so the order depends neither on numpy's version nor on the platform.

There are two kinds of permutation. ``global``: any tile may stand anywhere. ``block``: the selected tiles of a shard
are a block; blocks are permuted, and the tiles of a group of consecutive blocks are shuffled together, so that an epoch
needs each shard in one stretch, and few shards at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError

LABELLED, UNLABELLED = 0, 1  # stream numbers
_ORDER, _AUGMENT, _BLOCKS, _MIX = 0, 1, 2, 3  # domains that keep the uses of one key apart

Indices = NDArray[np.int64]


def _words(seed: int, stream: int, domain: int, number: int, count: int, group: int = 0) -> NDArray[np.uint64]:
    generator = np.random.Philox(
        key=np.array([seed, stream], np.uint64), counter=np.array([0, group, number, domain], np.uint64)
    )
    return generator.random_raw(count)


def _ranking(words: NDArray[np.uint64]) -> Indices:
    """The stable ascending argsort of random words, int64 [len(words)].

    Random 64-bit words are hardly ever equal, so numpy's quick, unstable sort gives the stable order; that it did is
    checked a piece at a time. (10 million words: 0.6 s and 160 MB, where the stable sort takes 1.3 s and 200 MB.)
    """
    order: Indices = np.argsort(words)
    piece = 1 << 16
    for start in range(0, len(order), piece):
        ranked = words[order[start : start + piece + 1]]
        if (ranked[1:] == ranked[:-1]).any():
            return np.argsort(words, kind="stable")
    return order


def permutation(size: int, seed: int, stream: int, epoch: int) -> Indices:
    """The permutation of ``range(size)`` of one epoch of one stream in the global order, int64 [size]."""
    return _ranking(_words(seed, stream, _ORDER, epoch, size))


class Order(Protocol):
    """A stream of tiles as consecutive segments, each computed on its own."""

    @property
    def size(self) -> int:
        """Tiles of an epoch."""

    def segment(self, position: int) -> tuple[int, Indices]:
        """The segment that ``position`` lies in: its first position, and its elements of ``[0, size)``."""


@dataclass(frozen=True)
class GlobalOrder:
    """The permutation of all tiles; a segment is an epoch."""

    size: int
    seed: int
    stream: int

    def segment(self, position: int) -> tuple[int, Indices]:
        """See :class:`Order`."""
        epoch = position // self.size
        return epoch * self.size, permutation(self.size, self.seed, self.stream, epoch)


@dataclass(frozen=True)
class BlockOrder:
    """Blocks permuted, the tiles of up to ``mix`` consecutive blocks shuffled together; a segment is such a group.

    The groups are as equal in blocks as can be (the first ones one longer), lest the last one mix only a few.

    Attributes:
        shards: the shard of each selected tile, [size]; tiles of equal shard make a block.
        mix: the largest number of blocks in a group.
    """

    shards: NDArray[np.unsignedinteger]
    seed: int
    stream: int
    mix: int

    @property
    def size(self) -> int:
        """See :class:`Order`."""
        return len(self.shards)

    @cached_property
    def _blocks(self) -> tuple[NDArray[np.uint32], Indices]:
        """The elements sorted by block, and where each block begins, with the end."""
        kind = np.min_scalar_type(int(self.shards.max()))  # 16 bits are sorted by radix
        shards = self.shards.astype(kind)
        elements = np.argsort(shards, kind="stable").astype(np.uint32)
        counts = np.bincount(shards)
        return elements, np.concatenate([[0], np.cumsum(counts[counts > 0])])

    def segment(self, position: int) -> tuple[int, Indices]:
        """See :class:`Order`."""
        elements, starts = self._blocks
        epoch, place = divmod(position, self.size)
        blocks = _ranking(_words(self.seed, self.stream, _BLOCKS, epoch, len(starts) - 1))
        begin = epoch * self.size
        for number, group in enumerate(np.array_split(blocks, -(-len(blocks) // self.mix))):
            length = int((starts[group + 1] - starts[group]).sum())
            if place < length:
                members = np.concatenate([elements[starts[block] : starts[block + 1]] for block in group])
                shuffle = _ranking(_words(self.seed, self.stream, _MIX, epoch, length, number))
                return begin, members[shuffle].astype(np.int64)
            begin, place = begin + length, place - length
        raise AssertionError("groups make up the epoch")


def stream_slice(order: Order, start: int, stop: int) -> Indices:
    """Elements at stream positions ``[start, stop)``: int64 [stop - start], each in ``[0, order.size)``."""
    return _Window(order).take(start, stop)


class _Window:
    """Slices of a stream, most of them from the segment that the last one came from."""

    def __init__(self, order: Order) -> None:
        if order.size < 1:
            raise ValueError("a stream needs at least one tile")
        self._order = order
        self._begin, self._segment = 0, np.empty(0, np.int64)

    def take(self, start: int, stop: int) -> Indices:
        pieces = [np.empty(0, np.int64)]
        while start < stop:
            if not self._begin <= start < self._begin + len(self._segment):
                self._segment = np.empty(0, np.int64)  # freed before the next one is made
                self._begin, self._segment = self._order.segment(start)
            piece = self._segment[start - self._begin : stop - self._begin]
            pieces.append(piece)
            start += len(piece)
        return np.concatenate(pieces)


def augmentation_words(seed: int, stream: int, positions: Indices, count: int = 1, view: int = 0) -> NDArray[np.uint64]:
    """Random 64-bit words [N,count] for stream positions [N]: the randomness of one view of that sample on any layout.

    Words of a smaller ``count`` are the first of a larger one.
    """
    words = [_words(seed, stream, _AUGMENT, int(position), count, view) for position in positions]
    return np.stack(words) if words else np.empty((0, count), np.uint64)


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut: rank r takes a contiguous slice, micro-batch m a sub-slice of that.

    Attributes:
        world: number of ranks.
        rank: this rank.
        accumulation: micro-batches a round.
    """

    world: int = 1
    rank: int = 0
    accumulation: int = 1


class RankBatchSampler:
    """Batch sampler of one rank over one stream: yields micro-batches of ``(stream position, tile row)``.

    Args:
        rows: index rows of the selected tiles, int64 [N].
        order: of these N tiles.
        batch: global batch size G; a multiple of ``world * accumulation``.
        rounds: which rounds to yield.

    Raises:
        InputError: when G does not divide evenly, or there are fewer tiles than ranks.
    """

    def __init__(self, rows: Indices, order: Order, batch: int, rounds: range, layout: Layout) -> None:
        share = layout.world * layout.accumulation
        if batch < 1 or batch % share:
            raise InputError(
                f"a global batch of {batch} does not divide into {layout.world} ranks x {layout.accumulation} "
                f"micro-batches: make it a multiple of {share}"
            )
        if len(rows) < layout.world:
            raise InputError(
                f"{len(rows)} selected tiles for {layout.world} ranks: each rank needs at least one; "
                "use fewer processes, a larger data.labelled_share or more tiles"
            )
        self.rows, self.order, self.batch, self.rounds, self.layout = rows, order, batch, rounds, layout

    def __len__(self) -> int:
        return len(self.rounds) * self.layout.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        layout, window = self.layout, _Window(self.order)
        size = self.batch // (layout.world * layout.accumulation)
        for number in self.rounds:
            for micro in range(layout.accumulation):
                start = number * self.batch + (layout.rank * layout.accumulation + micro) * size
                rows = self.rows[window.take(start, start + size)]
                yield list(zip(range(start, start + size), rows.tolist(), strict=True))
