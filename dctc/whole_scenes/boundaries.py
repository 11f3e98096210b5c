"""Class boundaries, which the ISPRS leaves out of its second table of scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.manifest import IGNORE

RADIUS = 3  # pixels, of the ISPRS 2D semantic labelling contest (Potsdam, Vaihingen)
STRIP = 512  # rows worked on at once


def near_boundary(labels: NDArray[np.uint8], radius: int = RADIUS) -> NDArray[np.bool_]:
    """Where a pixel of another class lies within ``radius``, bool [H,W], for class ids uint8 [H,W].

    This is each class eroded by a disc of that radius: what the erosion takes away is near a boundary. Ignored pixels
    and the rim of the scene are no boundary.
    """
    height, width = labels.shape
    near = np.zeros(labels.shape, bool)
    disc = [
        (dy, dx)
        for dy in range(-radius, radius + 1)
        for dx in range(-radius, radius + 1)
        if 0 < dy * dy + dx * dx <= radius * radius
    ]
    for top in range(0, height, STRIP):
        rows = min(STRIP, height - top)
        around = np.full((rows + 2 * radius, width + 2 * radius), IGNORE, np.uint8)
        first, last = max(0, top - radius), min(height, top + rows + radius)
        around[first - top + radius : last - top + radius, radius : radius + width] = labels[first:last]
        centre = labels[top : top + rows]
        strip = near[top : top + rows]
        for dy, dx in disc:
            other = around[radius + dy : radius + dy + rows, radius + dx : radius + dx + width]
            strip |= (other != centre) & (other != IGNORE) & (centre != IGNORE)
    return near
