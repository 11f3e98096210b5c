"""Smooth blending of overlapping windows, in memory that does not grow with the scene's height."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.mapping.windows import Band, Grid

FLOOR = 1e-6  # of the peak weight: next to nothing beside a neighbour, everything where there is none


def taper(tile: int, margin: int) -> NDArray[np.float64]:
    """Weight of a window's pixels along one side, [tile]: FLOOR in the margins, a raised cosine between them.

    A net sees least context at the rim of its window, so the rim gives way to the neighbour that has it further inside;
    all pixels but those at the scene's own border are predicted with at least ``margin`` pixels of context.
    """
    depth = (np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5 - margin) / (tile / 2 - margin)
    return FLOOR + (1 - FLOOR) * np.sin(np.pi / 2 * np.clip(depth, 0, 1)) ** 2


def partition(starts: Sequence[int], tile: int, margin: int) -> NDArray[np.float32]:
    """Weights [windows, tile] of the windows at ``starts`` along one side, scaled to add up to 1 at every pixel.

    Where only one window lies, its weight is exactly 1. The weight of a pixel in two dimensions is the product of its
    two sides' weights, and those products add up to 1 as well, because the windows form a grid.
    """
    weight = taper(tile, margin)
    total = np.zeros(starts[-1] + tile)
    for start in starts:
        total[start : start + tile] += weight
    return np.stack([weight / total[start : start + tile] for start in starts]).astype(np.float32)


class Accumulator:
    """Blended class probabilities of the one band of rows that windows are still being added to.

    The buffer is float32 [classes, tile, width], however tall the scene is.
    """

    def __init__(self, classes: int, grid: Grid, device: torch.device) -> None:
        self.grid = grid
        self.buffer = torch.zeros(classes, grid.tile, grid.padded_width, device=device)
        self._rows = torch.from_numpy(partition(grid.tops, grid.tile, grid.margin)).to(device)
        self._columns = torch.from_numpy(partition(grid.lefts, grid.tile, grid.margin)).to(device)

    def add(self, probabilities: Tensor, band: Band, columns: Sequence[int]) -> None:
        """Add windows [n, classes, tile, tile] of one band; ``columns`` are their positions in ``grid.lefts``."""
        for window, column in zip(probabilities, columns, strict=True):
            left = self.grid.lefts[column]
            weight = self._rows[band.row][:, None] * self._columns[column][None, :]
            self.buffer[:, :, left : left + self.grid.tile].addcmul_(window, weight)

    def flush(self, band: Band) -> Tensor:
        """The rows that ``band`` completed, [classes, band.done - band.top, width]; the buffer moves down."""
        rows = band.done - band.top
        complete = self.buffer[:, :rows, : self.grid.width].clone()
        rest = self.grid.tile - rows
        for plane in self.buffer:  # class by class: the copy that moving needs is then small
            plane[:rest] = plane[rows:].clone()
        self.buffer[:, rest:] = 0
        return complete
