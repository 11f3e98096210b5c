"""A moving band of rows over a raster, so that a scene is read from top to bottom and each source block once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.tiling import Window

Array = npt.NDArray[Any]


class Rows:
    """A moving band of rows over a raster; requests must not go back before the start of the last one."""

    def __init__(self, load: Callable[[int, int], Array], height: int, block: int, ahead: int) -> None:
        """``load(start, stop)`` reads rows as [..., rows, width]; ``block`` is the height of the source's blocks."""
        self._load, self._height = load, height
        self._chunk = block * max(1, ahead // block)
        self._held: list[Array] = []
        self._start = self._stop = 0

    def take(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``min(stop, height)`` as [..., rows, width]."""
        stop = min(stop, self._height)
        while self._stop < stop:
            end = min(self._stop + self._chunk, self._height)
            self._held.append(self._load(self._stop, end))
            self._stop = end
        while self._held and self._start + self._held[0].shape[-2] <= start:
            self._start += self._held.pop(0).shape[-2]
        if len(self._held) > 1:  # once for all windows that begin at this row
            first = self._held[0][..., start - self._start :, :]
            self._held, self._start = [np.concatenate([first, *self._held[1:]], axis=-2)], start
        return self._held[0][..., start - self._start : stop - self._start, :]

    def cut(self, window: Window, fill: int) -> Array:
        """A window [..., size, size], padded with ``fill`` beyond the scene; a copy."""
        size = window.size
        inside = self.take(window.row, window.row + size)[..., window.col : window.col + size]
        padded = np.full((*inside.shape[:-2], size, size), fill, dtype=inside.dtype)
        padded[..., : inside.shape[-2], : inside.shape[-1]] = inside
        return padded
