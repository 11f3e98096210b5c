"""Statistics of bands that can be gathered in pieces and in any order, with the same result to the last bit.

Integer bands: a histogram of every value, so that mean and standard deviation come from exact integer sums and the
percentiles equal ``numpy.percentile`` of all pixels. float32 bands: each tile's count, mean and squared deviation by a
two-pass in float64, joined by correctly rounded sums (``math.fsum``), exact to about 1e-15; minimum and maximum are
exact; percentiles come from a histogram of the upper 20 bits of the number, so they are too small in magnitude by a
relative error below 2**-11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.files import atomic_file

PERCENTILES = (1, 2, 50, 98, 99)
_FLOAT_SHIFT = 12
_SIGN = np.uint32(1 << 31)
_CODES = {"uint8": 1 << 8, "uint16": 1 << 16, "int16": 1 << 16, "float32": 1 << 20}


@dataclass(frozen=True)
class BandSummary:
    """Statistics of one band; ``std`` is that of the population."""

    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: dict[str, float]


@dataclass
class Statistics:
    """Histograms of some tiles' valid pixels, int64 [C, codes], and for float32 also a row of moments a tile."""

    dtype: str
    bands: int
    counts: npt.NDArray[np.int64] = field(init=False)
    moments: list[npt.NDArray[np.float64]] = field(init=False, default_factory=list)  # [C, 5]: n, mean, m2, min, max

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.bands, _CODES[self.dtype]), dtype=np.int64)

    def add(self, pixels: npt.NDArray[Any]) -> None:
        """Count the valid pixels [C, N] of one tile."""
        for band, values in enumerate(pixels):
            if values.dtype == np.uint8:
                self.counts[band] += histogram(values)
            elif len(values):
                codes = _encode(values)
                first = codes.min()
                counts = np.bincount(codes - first)  # values of one tile lie near each other
                self.counts[band, first : first + len(counts)] += counts
        if self.dtype == "float32" and pixels.shape[1]:
            self.moments.append(_moments(pixels.astype(np.float64)))

    def add_counts(self, counts: npt.NDArray[np.integer[Any]]) -> None:
        """Count the valid pixels of one tile of integers by their histograms [C, codes]."""
        self.counts += counts

    def merge(self, other: Statistics) -> None:
        """Add the pixels of ``other``."""
        self.counts += other.counts
        self.moments += other.moments

    def save(self, path: Path) -> None:
        """Write to a .npz file, without the empty codes."""
        band, code = np.nonzero(self.counts)
        moments = np.stack(self.moments) if self.moments else np.zeros((0, self.bands, 5))
        with atomic_file(path) as file:
            np.savez(file, band=band, code=code, count=self.counts[band, code], moments=moments)

    @classmethod
    def load(cls, path: Path, dtype: str, bands: int) -> Statistics:
        """Read what :meth:`save` wrote."""
        statistics = cls(dtype, bands)
        with np.load(path) as stored:
            statistics.counts[stored["band"], stored["code"]] = stored["count"]
            statistics.moments = list(stored["moments"])
        return statistics

    def summary(self, band: int) -> BandSummary:
        """Statistics of one band, which must have a pixel."""
        codes = np.flatnonzero(self.counts[band])
        counts = self.counts[band, codes]
        values = _decode(codes, self.dtype)
        if self.dtype == "float32":
            mean, std, low, high = _join(np.stack(self.moments)[:, band])
        else:
            mean, std = _exact(values, counts)
            low, high = float(values[0]), float(values[-1])
        percentiles = {str(p): min(max(_percentile(values, counts, p), low), high) for p in PERCENTILES}
        return BandSummary(mean, std, low, high, percentiles)


def histogram(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each value 0 to 255 occurs in an array [N], int64 [256]."""
    if values.size % 2:
        return np.bincount(values, minlength=256)
    # Two pixels at a time: bincount's cost is that of the elements, not of the bins.
    pairs = np.bincount(np.ascontiguousarray(values).view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: npt.NDArray[np.int64] = pairs.sum(axis=0) + pairs.sum(axis=1)
    return counts


def _encode(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Histogram codes that sort like the values."""
    if values.dtype == np.float32:
        bits = np.ascontiguousarray(values).view(np.uint32)
        ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
        return (ordered >> _FLOAT_SHIFT).astype(np.int64)
    return values.astype(np.int64) - (np.iinfo(np.int16).min if values.dtype == np.int16 else 0)


def _decode(codes: npt.NDArray[np.int64], dtype: str) -> npt.NDArray[Any]:
    """Values of codes, in ascending order; for float32 the one of least magnitude."""
    if dtype != "float32":
        return codes + (np.iinfo(np.int16).min if dtype == "int16" else 0)
    ordered = codes.astype(np.uint32) << _FLOAT_SHIFT
    low = np.uint32((1 << _FLOAT_SHIFT) - 1)
    bits = np.where(ordered & _SIGN, ordered & ~_SIGN, ~(ordered | low))
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _exact(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    pairs = list(zip(values.tolist(), counts.tolist(), strict=True))
    total = sum(count for _, count in pairs)
    first = sum(value * count for value, count in pairs)
    second = sum(value * value * count for value, count in pairs)
    return float(Fraction(first, total)), math.sqrt(Fraction(second * total - first * first, total * total))


def _moments(pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mean = pixels.mean(axis=1)
    deviation = ((pixels - mean[:, None]) ** 2).sum(axis=1)
    count = np.full(len(pixels), float(pixels.shape[1]))
    return np.stack([count, mean, deviation, pixels.min(axis=1), pixels.max(axis=1)], axis=1)


def _join(moments: npt.NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Mean, standard deviation, minimum and maximum of all tiles of a band, from rows [T, 5]."""
    count, means, deviations = moments[:, 0], moments[:, 1], moments[:, 2]
    total = math.fsum(count)
    mean = math.fsum(count * means) / total
    variance = math.fsum(deviations + count * (means - mean) ** 2) / total
    return mean, math.sqrt(variance), float(moments[:, 3].min()), float(moments[:, 4].max())


def _percentile(values: npt.NDArray[Any], counts: npt.NDArray[np.int64], percent: int) -> float:
    """As numpy's linear interpolation between the two nearest order statistics."""
    ends = np.cumsum(counts)
    place = Fraction(percent, 100) * int(ends[-1] - 1)
    lower = math.floor(place)
    low, high = (float(values[np.searchsorted(ends, k, side="right")]) for k in (lower, math.ceil(place)))
    return low + (high - low) * float(place - lower)
