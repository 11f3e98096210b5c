"""Which windows a scene is predicted in: a regular grid that covers every pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError

MAX_OVERLAP = 0.9  # at 0.9 every pixel is predicted about 100 times already


@dataclass(frozen=True)
class Band:
    """One row of windows.

    Attributes:
        row: its number, from the top.
        top: first scene row of its windows.
        bottom: one past the last scene row of its windows, never beyond the scene.
        done: rows before this one get nothing from the bands below, so they are final.
    """

    row: int
    top: int
    bottom: int
    done: int


@dataclass(frozen=True)
class Grid:
    """Windows of ``tile`` x ``tile`` pixels, one at every (top, left) of ``tops`` x ``lefts``.

    A side shorter than ``tile`` has one window at 0, which reaches over the end of the scene (padded by the reader);
    every other window lies inside the scene.
    """

    height: int
    width: int
    tile: int
    margin: int  # rim of a window, in pixels, that counts for nothing where a neighbour lies: a quarter of the overlap
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def over(cls, height: int, width: int, tile: int, overlap: float) -> Grid:
        """The grid over a scene in which neighbouring windows share at least ``overlap`` of their side.

        Raises:
            InputError: when ``overlap`` lies outside [0, 0.9].
        """
        if not 0 <= overlap <= MAX_OVERLAP:
            raise InputError(
                f"overlap {overlap} is outside [0, {MAX_OVERLAP}]: it is the share of a tile's side, 0.25 is usual"
            )
        stride = max(1, tile - round(overlap * tile))
        return cls(height, width, tile, (tile - stride) // 4, spread(height, tile, stride), spread(width, tile, stride))

    @property
    def padded_width(self) -> int:
        """Columns that the windows reach over: the scene's, or one tile where the scene is narrower."""
        return max(self.width, self.tile)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.tops) * len(self.lefts)

    def bands(self, own: range | None = None) -> Iterator[Band]:
        """The rows of windows from top to bottom: all, or the ones of ``own`` and before them those that reach there.

        With the latter, the rows of pixels that ``own`` completes get what all windows give them, in the same order.
        """
        rows = range(len(self.tops)) if own is None else own
        if not rows:
            return
        first = next(row for row, top in enumerate(self.tops) if top + self.tile > self.tops[rows.start])
        for row in range(first, rows.stop):
            top, last = self.tops[row], row + 1 == len(self.tops)
            yield Band(row, top, min(top + self.tile, self.height), self.height if last else self.tops[row + 1])


def spread(size: int, tile: int, stride: int) -> tuple[int, ...]:
    """Starts of the fewest windows that cover ``size`` pixels at even steps of at most ``stride``.

    Even steps share the surplus of the last window among all overlaps, so that none is thinner than asked for.
    """
    if size <= tile:
        return (0,)
    steps = math.ceil((size - tile) / stride)
    return tuple(step * (size - tile) // steps for step in range(steps + 1))


def reflect(strip: NDArray[Any], tile: int) -> NDArray[Any]:
    """Grow the last two sides to ``tile`` at least, mirrored at the end, as often as it takes."""
    height, width = (max(0, tile - side) for side in strip.shape[-2:])
    if not height and not width:
        return strip
    return np.pad(strip, [(0, 0)] * (strip.ndim - 2) + [(0, height), (0, width)], mode="reflect")
