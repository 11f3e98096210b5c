"""Protocol ``block``: squares inside scenes are drawn; no tile of another split lies nearer to them than the gap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.manifest import SPLITS, Separation
from shards.sections import Blocks
from shards.splits import DROPPED, TEST, TRAIN, VAL, draw

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where the tiles lie: number of the scene, first row and first column [N], and the side of all of them."""

    scene: Ints
    row: Ints
    col: Ints
    size: int

    def scenes(self) -> Iterator[Ints]:
        """The tiles of each scene."""
        order = np.argsort(self.scene, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(self.scene[order])) + 1)


def block_splits(
    blocks: Blocks, seed: int, step: int, places: Places, labelled: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Split code of each tile; :data:`DROPPED` where it lies too near to one of another split.

    A block is a square of ``blocks.size`` strides; a tile belongs to the block of its upper left corner. Blocks with a
    labelled tile are drawn from; train gives way to val, and both give way to test.

    Raises:
        InputError: when there are too few blocks for the shares.
    """
    side = blocks.size * step
    keys = np.stack([places.scene, places.row // side, places.col // side], axis=1)
    found, block_of = np.unique(keys, axis=0, return_inverse=True)
    block_of = block_of.reshape(-1)
    drawn_from = np.unique(block_of[labelled])
    of_block = np.full(len(found), TRAIN, dtype=np.uint8)
    if drawn_from.size:
        of_block[drawn_from] = draw(blocks, seed, len(drawn_from), "blocks")
    codes: npt.NDArray[np.uint8] = of_block[block_of]
    for rows in places.scenes():
        for weak, strong in ((VAL, [TEST]), (TRAIN, [TEST, VAL])):
            near = _near(places, rows, np.isin(codes[rows], strong), blocks.gap)
            codes[rows[near & (codes[rows] == weak)]] = DROPPED
    return codes


def _near(places: Places, rows: Ints, others: npt.NDArray[np.bool_], gap: int) -> npt.NDArray[np.bool_]:
    """Which tiles of a scene have fewer than ``gap`` pixels between them and one of the others, or overlap one."""
    reach = places.size + gap
    tops, top_of = np.unique(places.row[rows], return_inverse=True)
    lefts, left_of = np.unique(places.col[rows], return_inverse=True)
    counts = np.zeros((len(tops) + 1, len(lefts) + 1), dtype=np.int64)
    np.add.at(counts, (top_of[others] + 1, left_of[others] + 1), 1)
    sums = counts.cumsum(axis=0).cumsum(axis=1)
    (a, b), (c, d) = (
        (np.searchsorted(starts, starts - reach, side="right"), np.searchsorted(starts, starts + reach, side="left"))
        for starts in (tops, lefts)
    )
    inside = sums[np.ix_(b, d)] - sums[np.ix_(a, d)] - sums[np.ix_(b, c)] + sums[np.ix_(a, c)]
    near: npt.NDArray[np.bool_] = inside[top_of, left_of] > 0
    return near


def separation(places: Places, codes: npt.NDArray[np.uint8], gap: int) -> Separation:
    """The proof: the fewest pixels between two tiles of different splits of one scene, measured on the final tiles.

    Negative where tiles overlap, null where no scene has tiles of both splits.

    Raises:
        InputError: when it is less than the gap.
    """
    distances: dict[str, int | None] = {}
    for one, other in combinations(range(len(SPLITS)), 2):
        least = min(
            (
                _nearest(places, rows[codes[rows] == one], rows[codes[rows] == other])
                for rows in places.scenes()
                if (codes[rows] == one).any() and (codes[rows] == other).any()
            ),
            default=None,
        )
        name = f"{SPLITS[one]}-{SPLITS[other]}"
        distances[name] = None if least is None else least - places.size
        if least is not None and least - places.size < gap:
            raise InputError(
                f"splits.block: tiles of {name} lie {least - places.size} pixels apart, less than the gap {gap}: this "
                "is a fault of dctc, please report it with the recipe"
            )
    return Separation(gap=gap, distances=distances)


def _nearest(places: Places, ones: Ints, others: Ints) -> int:
    """The smallest of max(|rows apart|, |columns apart|) over all pairs of one and another tile."""
    columns = {
        int(top): np.sort(places.col[others][places.row[others] == top]) for top in np.unique(places.row[others])
    }
    best = np.iinfo(np.int64).max
    for top in np.unique(places.row[ones]).tolist():
        mine = places.col[ones][places.row[ones] == top]
        for theirs in sorted(columns, key=lambda row: abs(row - top)):
            if abs(theirs - top) >= best:
                break
            sorted_columns = columns[theirs]
            after = np.searchsorted(sorted_columns, mine).clip(max=len(sorted_columns) - 1)
            apart = np.minimum(
                np.abs(sorted_columns[after] - mine), np.abs(sorted_columns[(after - 1).clip(min=0)] - mine)
            )
            best = min(best, max(abs(theirs - top), int(apart.min())))
    return best
