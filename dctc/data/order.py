"""The order of training tiles as a pure function (no state, no rank, no worker in it).

``O_e`` is a permutation of the selected tiles keyed by (seed, stream, epoch); a stream is ``O_0 ++ O_1 ++ ...``. Round
s uses stream positions ``[s*G, (s+1)*G)`` of a global batch of G, whoever reads them. Raw Philox words are part of the
algorithm's definition, so the order depends neither on numpy's version nor on the platform.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError

LABELLED, UNLABELLED = 0, 1  # stream numbers
_ORDER, _AUGMENT = 0, 1  # domains that keep the two uses of one key apart

Indices = NDArray[np.int64]


def _words(seed: int, stream: int, domain: int, number: int, count: int, group: int = 0) -> NDArray[np.uint64]:
    generator = np.random.Philox(
        key=np.array([seed, stream], np.uint64), counter=np.array([0, group, number, domain], np.uint64)
    )
    return generator.random_raw(count)


def permutation(size: int, seed: int, stream: int, epoch: int) -> Indices:
    """The permutation of ``range(size)`` of one epoch of one stream, int64 [size]."""
    return np.argsort(_words(seed, stream, _ORDER, epoch, size), kind="stable").astype(np.int64, copy=False)


def stream_slice(size: int, seed: int, stream: int, start: int, stop: int) -> Indices:
    """Elements at stream positions ``[start, stop)``: int64 [stop - start], each in ``[0, size)``."""
    if size < 1:
        raise ValueError("a stream needs at least one tile")
    pieces = [
        permutation(size, seed, stream, epoch)[max(start - epoch * size, 0) : stop - epoch * size]
        for epoch in range(start // size, -(-stop // size))
    ]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


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
        batch: global batch size G; a multiple of ``world * accumulation``.
        rounds: which rounds to yield.

    Raises:
        InputError: when G does not divide evenly, or there are fewer tiles than ranks.
    """

    def __init__(self, rows: Indices, batch: int, rounds: range, seed: int, stream: int, layout: Layout) -> None:
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
        self.rows, self.batch, self.rounds, self.seed, self.stream, self.layout = (
            rows,
            batch,
            rounds,
            seed,
            stream,
            layout,
        )

    def __len__(self) -> int:
        return len(self.rounds) * self.layout.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        layout = self.layout
        size = self.batch // (layout.world * layout.accumulation)
        epoch, order = -1, np.empty(0, np.int64)
        for number in self.rounds:
            for micro in range(layout.accumulation):
                start = number * self.batch + (layout.rank * layout.accumulation + micro) * size
                members = []
                for position in range(start, start + size):
                    if position // len(self.rows) != epoch:  # an epoch's permutation is made once, not once a batch
                        epoch = position // len(self.rows)
                        order = permutation(len(self.rows), self.seed, self.stream, epoch)
                    members.append((position, int(self.rows[order[position % len(self.rows)]])))
                yield members
