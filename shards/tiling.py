"""Windows over a scene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Edge = Literal["pad", "shift", "drop"]


@dataclass(frozen=True, order=True)
class Window:
    """A square of pixels by its upper left corner; with edge ``pad`` it may reach beyond the scene."""

    row: int
    col: int
    size: int


def offsets(length: int, size: int, step: int, edge: Edge) -> list[int]:
    """First pixels of the windows along one axis of ``length`` pixels, ascending.

    - ``pad``: as many steps as cover the axis; the last window may reach beyond it.
    - ``shift``: the same number, but the last window ends with the axis (and overlaps its neighbour).
    - ``drop``: only windows that lie wholly inside.

    An axis shorter than a window gets one padded window at 0, except with ``drop``.
    """
    if edge == "drop":
        return list(range(0, length - size + 1, step))
    beyond = max(0, length - size)
    starts = list(range(0, beyond + step, step))
    starts = starts[: -(-beyond // step) + 1]
    if edge == "shift":
        starts[-1] = beyond
    return starts


def windows(height: int, width: int, size: int, step: int, edge: Edge) -> Iterator[Window]:
    """Windows over a scene of ``height`` x ``width`` pixels in row-major order."""
    cols = offsets(width, size, step, edge)
    for row in offsets(height, size, step, edge):
        for col in cols:
            yield Window(row, col, size)
