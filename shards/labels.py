"""Colours -> class ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.sections import ClassColor, Palette

# Codes of pixels without a class while a scene is read; in a tile they all become manifest.IGNORE.
IGNORE_COLOR, UNMATCHED, NODATA = 255, 254, 253
REASONS = {"ignore_color": IGNORE_COLOR, "unmatched": UNMATCHED, "nodata": NODATA}
FIRST_REASON = min(REASONS.values())

_COLORS = 1 << 24


class PaletteDecoder:
    """Decodes the colour mask of one scene and counts the colours that it does not know.

    A pixel belongs to the nearest colour of the palette (classes and ignore colours; distance = largest channel
    difference; the first of equals) if that lies within ``tolerance``. With ``threshold`` each channel is first
    set to 255 above it and to 0 otherwise, ``tolerance`` limits how far any channel moves, and what results must be
    a colour of the palette.
    """

    def __init__(self, label: Palette, classes: Sequence[ClassColor]) -> None:
        self._label = label
        ignored = len(label.ignore_colors)
        self._palette = np.array([*(c.color for c in classes), *label.ignore_colors], dtype=np.int16)
        self._codes = np.array([*range(len(classes)), *[IGNORE_COLOR] * ignored], dtype=np.uint8)
        self._packed = _pack(self._palette.T)
        self._unknown: npt.NDArray[np.uint32] | None = None
        self.pixels = 0

    def decode(self, colors: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Class ids and reason codes, uint8 [H,W], of colours uint8 [3,H,W] or, with transparency, [4,H,W].

        What is wholly transparent holds no label, whatever its colour.
        """
        packed = _pack(colors[:3])
        codes = np.full(packed.shape, UNMATCHED, dtype=np.uint8)
        for color, code in zip(self._packed.tolist(), self._codes.tolist(), strict=True):
            # The colours differ, so a pixel takes one of these steps at most. Masked assignment costs four times this.
            codes += (packed == color).view(np.uint8) * np.uint8((code - UNMATCHED) % 256)
        transparent = np.zeros(packed.shape, dtype=bool) if len(colors) == 3 else colors[3] == 0
        self.pixels += packed.size - int(np.count_nonzero(transparent))
        unknown = (codes == UNMATCHED) & ~transparent
        if unknown.any():
            codes[unknown] = self._nearest(packed[unknown])
        codes[transparent] = NODATA
        return codes

    def _nearest(self, packed: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        colors, place, counts = np.unique(packed, return_inverse=True, return_counts=True)
        channels = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1).astype(np.int16)
        threshold = self._label.threshold
        target = channels if threshold is None else np.where(channels > threshold, 255, 0).astype(np.int16)
        reach = np.stack([np.abs(target - color).max(axis=1) for color in self._palette])
        nearest = reach.argmin(axis=0)
        if threshold is None:
            known = reach.min(axis=0) <= self._label.tolerance
        else:
            known = (reach.min(axis=0) == 0) & (np.abs(channels - target).max(axis=1) <= self._label.tolerance)
        self._count_unknown(colors[~known], counts[~known])
        codes: npt.NDArray[np.uint8] = np.where(known, self._codes[nearest], np.uint8(UNMATCHED))[place]
        return codes

    def _count_unknown(self, colors: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> None:
        if colors.size:
            if self._unknown is None:
                self._unknown = np.zeros(_COLORS, dtype=np.uint32)
            self._unknown[colors] += counts.astype(np.uint32)

    @property
    def unmatched(self) -> int:
        """Pixels of unknown colour so far."""
        return 0 if self._unknown is None else int(self._unknown.sum(dtype=np.int64))

    def unknown_colors(self, most: int = 5) -> list[tuple[tuple[int, int, int], int]]:
        """The most frequent unknown colours with their pixel counts, most frequent first."""
        if self._unknown is None:
            return []
        found = np.flatnonzero(self._unknown)
        order = np.argsort(-self._unknown[found].astype(np.int64), kind="stable")[:most]
        return [((c >> 16, c >> 8 & 255, c & 255), int(self._unknown[c])) for c in found[order].tolist()]


def _pack(rgb: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    packed: npt.NDArray[np.int32] = rgb[0].astype(np.int32)
    for channel in rgb[1:]:
        packed <<= 8
        packed |= channel.astype(np.uint8)
    return packed
