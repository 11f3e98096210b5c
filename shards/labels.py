"""Colours and numbers -> class ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.inputs import IGNORE_WORD, Ids, Palette
from shards.sections import ClassColor

# Codes of pixels without a class while a scene is read; in a tile they all become manifest.IGNORE.
IGNORE_VALUE, UNMATCHED, LABEL_NODATA, IMAGE_NODATA, MASKED, UNLABELLED, PADDING = range(255, 248, -1)
REASONS = {
    "ignore_value": IGNORE_VALUE,  # a colour, number or attribute that the recipe maps to "ignore"
    "unmatched": UNMATCHED,  # one that it does not know
    "label_nodata": LABEL_NODATA,  # the label's own nodata value, mask or transparency
    "image_nodata": IMAGE_NODATA,  # no valid image pixel
    "mask": MASKED,  # set aside by a mask file
    "unlabelled": UNLABELLED,  # under no feature
    "padding": PADDING,  # beyond the scene's edge
}
FIRST_REASON = min(REASONS.values())

_COLORS = 1 << 24
_REMEMBERED = 1 << 16  # different unknown numbers of which counts are kept


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
        self._codes = np.array([*range(len(classes)), *[IGNORE_VALUE] * ignored], dtype=np.uint8)
        self._packed = _pack(self._palette.T)
        self._unknown: npt.NDArray[np.uint32] | None = None
        self.pixels = 0

    def decode(
        self,
        colors: npt.NDArray[np.uint8],
        hidden: npt.NDArray[np.bool_] | None = None,
        nodata: float | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Class ids and reason codes, uint8 [H,W], of colours uint8 [3,H,W] or, with transparency, [4,H,W].

        What is ``hidden`` (bool [H,W]) or wholly transparent holds no label, whatever its colour; neither does what is
        ``nodata`` in all three channels, unless the recipe knows that colour.
        """
        packed = _pack(colors[:3])
        codes = np.full(packed.shape, UNMATCHED, dtype=np.uint8)
        for color, code in zip(self._packed.tolist(), self._codes.tolist(), strict=True):
            # The colours differ, so a pixel takes one of these steps at most. Masked assignment costs four times this.
            codes += (packed == color).view(np.uint8) * np.uint8((code - UNMATCHED) % 256)
        away = np.zeros(packed.shape, dtype=bool) if len(colors) == 3 else colors[3] == 0
        if hidden is not None:
            away |= hidden
        if nodata is not None and nodata in range(256):
            away |= (codes == UNMATCHED) & (packed == int(nodata) * 0x010101)
        self.pixels += packed.size - int(np.count_nonzero(away))
        unknown = (codes == UNMATCHED) & ~away
        if unknown.any():
            codes[unknown] = self._nearest(packed[unknown])
        codes[away] = LABEL_NODATA
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

    def unknown_values(self, most: int = 5) -> list[tuple[str, int]]:
        """The most frequent unknown colours, as "r,g,b", with their pixel counts, most frequent first."""
        if self._unknown is None:
            return []
        found = np.flatnonzero(self._unknown)
        order = np.argsort(-self._unknown[found].astype(np.int64), kind="stable")[:most]
        return [(f"{c >> 16},{c >> 8 & 255},{c & 255}", int(self._unknown[c])) for c in found[order].tolist()]


class IdsDecoder:
    """Decodes the numbers of one label raster and counts those that it does not know.

    A number stands for the class or "ignore" that the map gives it, without a map for the class at its place. What the
    map does not name and what is the file's nodata value, or not a number, holds no label.
    """

    def __init__(self, label: Ids, classes: Sequence[ClassColor], tagged: float | None) -> None:
        """``tagged`` is the nodata value of the label file."""
        places = {c.name: place for place, c in enumerate(classes)} | {IGNORE_WORD: IGNORE_VALUE}
        codes = dict(enumerate(range(len(classes))))
        if label.map is not None:
            codes = {value: places[name] for value, name in label.map.items()}
        self.nodata = ids_nodata(label, tagged)
        if self.nodata in codes:
            del codes[int(self.nodata)]
        values = sorted(codes)
        self._values = np.array(values, dtype=np.int64)
        self._codes = np.array([codes[value] for value in values], dtype=np.uint8)
        self._unknown: Counter[int | float] = Counter()
        self.pixels = self.unmatched = 0

    def decode(self, numbers: npt.NDArray[Any], hidden: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.uint8]:
        """Class ids and reason codes, uint8 [H,W], of numbers [H,W]; what is ``hidden`` (bool [H,W]) holds no label."""
        codes = self._look_up(numbers)
        away = np.isnan(numbers) if numbers.dtype.kind == "f" else np.zeros(numbers.shape, dtype=bool)
        if self.nodata is not None:
            away |= numbers == self.nodata
        if hidden is not None:
            away |= hidden
        codes[away] = LABEL_NODATA
        self.pixels += numbers.size - int(np.count_nonzero(away))
        strange = codes == UNMATCHED
        if strange.any():
            self._count_unknown(numbers[strange])
        return codes

    def _look_up(self, numbers: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        codes = np.full(numbers.shape, UNMATCHED, dtype=np.uint8)
        # A recipe knows few values, and comparing is exact for every dtype: no float is rounded to an integer.
        for value, code in zip(self._values.tolist(), self._codes.tolist(), strict=True):
            if numbers.dtype.kind in "iu" and not np.iinfo(numbers.dtype).min <= value <= np.iinfo(numbers.dtype).max:
                continue
            codes += (numbers == value).view(np.uint8) * np.uint8((code - UNMATCHED) % 256)
        return codes

    def _count_unknown(self, numbers: npt.NDArray[Any]) -> None:
        self.unmatched += numbers.size
        values, counts = np.unique(numbers, return_counts=True)
        self._unknown.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if len(self._unknown) > _REMEMBERED:  # measurements instead of classes: memory stays bounded
            self._unknown = Counter(dict(self._ranked()[: _REMEMBERED // 2]))

    def _ranked(self) -> list[tuple[int | float, int]]:
        return sorted(self._unknown.items(), key=lambda item: (-item[1], item[0]))

    def unknown_values(self, most: int = 5) -> list[tuple[str, int]]:
        """The most frequent unknown numbers with their pixel counts, most frequent first."""
        return [(f"{value:.12g}", count) for value, count in self._ranked()[:most]]


def ids_nodata(label: Ids, tagged: float | None) -> float | None:
    """The number that means "no label" in a file whose nodata value is ``tagged``; a number in the map never does."""
    if label.nodata is not None:
        return label.nodata
    return None if label.map is not None and tagged in label.map else tagged


def _pack(rgb: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    packed: npt.NDArray[np.int32] = rgb[0].astype(np.int32)
    for channel in rgb[1:]:
        packed <<= 8
        packed |= channel.astype(np.uint8)
    return packed
