"""Read a scene from top to bottom, each source block decoded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from rasterio.windows import Window as RasterWindow

from shards.labels import PaletteDecoder
from shards.scenes import has_palette, naming
from shards.sections import Nodata

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


def block_height(source: DatasetReader) -> int:
    """Rows of the source's storage blocks."""
    return max(int(shape[0]) for shape in source.block_shapes)


def image_loader(source: DatasetReader, indexes: list[int], nodata: Nodata) -> Callable[[int, int], Array]:
    """Reads rows of the kept bands with their validity as a last band of the same dtype (1 valid, 0 not).

    Pixels that are not valid are set to 0 in all bands: what a nodata pixel holds (-9999, NaN) is no measurement
    and must not reach a network.
    """

    def load(start: int, stop: int) -> Array:
        window = RasterWindow(0, start, source.width, stop - start)
        with naming(source.name):
            if has_palette(source):
                pixels = _expand(source, source.read(1, window=window))[[index - 1 for index in indexes]]
            else:
                pixels = source.read(indexes, window=window)
            valid = _validity(source, indexes, nodata, pixels, window)
        rows = np.concatenate([pixels, valid[None].astype(pixels.dtype)])
        rows[:-1, ~valid] = 0
        return rows

    return load


def _validity(
    source: DatasetReader, indexes: list[int], nodata: Nodata, pixels: Array, window: RasterWindow
) -> npt.NDArray[np.bool_]:
    valid: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(pixels), axis=0)
    if nodata.alpha is not None:
        valid &= source.read(nodata.alpha, window=window) > 0
    values: list[float | None] = [nodata.value] * len(indexes)
    if nodata.use_tag and not has_palette(source):
        flags = source.mask_flag_enums[0]
        if MaskFlags.per_dataset in flags and not _keeps_alpha(source, indexes):
            valid &= source.read_masks(1, window=window) > 0
        if nodata.value is None and MaskFlags.nodata in flags:
            values = [source.nodatavals[i - 1] for i in indexes]
    if any(value is not None for value in values):
        holds = np.stack(
            [np.zeros_like(valid) if v is None else band == v for band, v in zip(pixels, values, strict=True)]
        )
        valid &= ~(holds.all(axis=0) if nodata.match == "all" else holds.any(axis=0))
    return valid


def _keeps_alpha(source: DatasetReader, indexes: list[int]) -> bool:
    """Whether a band to keep is tagged as alpha: writers tag a fourth band so although it is near infrared."""
    return any(source.colorinterp[index - 1] == ColorInterp.alpha for index in indexes)


def label_loader(source: DatasetReader, decoder: PaletteDecoder) -> Callable[[int, int], Array]:
    """Reads rows of class ids and reason codes, uint8."""

    def load(start: int, stop: int) -> Array:
        window = RasterWindow(0, start, source.width, stop - start)
        with naming(source.name):
            if has_palette(source):
                colors = _expand(source, source.read(1, window=window))
            else:
                colors = source.read(list(range(1, min(source.count, 4) + 1)), window=window)
        return decoder.decode(colors)

    return load


def _expand(source: DatasetReader, places: Array) -> Array:
    """Colours [4,H,W] (RGBA) of places in the source's colour table [H,W]."""
    table = np.zeros((256, 4), dtype=np.uint8)
    for place, color in source.colormap(1).items():
        table[place] = color
    return np.moveaxis(table[places], -1, 0)
