"""Images -> rows of the kept bands with their validity: one file of many bands, or a stack of single-band files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader

from shards.grids import Grid, OnGrid, on_grid
from shards.headers import common_dtype
from shards.rasters import expand, has_palette, open_raster, tagged_nodata
from shards.recipe import Recipe
from shards.scenes import Scene
from shards.sections import Nodata

Array = npt.NDArray[Any]


@contextmanager
def open_image(recipe: Recipe, root: Path, scene: Scene) -> Iterator[ImageReader]:
    """Open all image files of a scene; files on another grid than the first are warped where the recipe says so."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_raster(root / path)) for path in scene.images]
        grid = Grid.of(files[0])
        placed = []
        for file in files:
            resampling = None if grid.same_as(Grid.of(file)) else recipe.image.resampling
            nodata = _nodata(recipe.nodata, file, 1)
            placed.append(stack.enter_context(on_grid(file, grid, resampling, nodata)))
        yield ImageReader(placed, grid, recipe.bands.indexes, recipe.nodata)


def _nodata(rules: Nodata, file: DatasetReader, index: int) -> float | None:
    """The nodata value that counts for band ``index`` of a file."""
    if rules.value is not None:
        return rules.value
    return tagged_nodata(file, index) if rules.use_tag and not has_palette(file) else None


class ImageReader:
    """The kept bands of one scene."""

    def __init__(self, files: Sequence[OnGrid], grid: Grid, indexes: list[int], nodata: Nodata) -> None:
        self.grid = grid
        self._files, self._indexes, self._rules = files, indexes, nodata
        self._stack = len(files) > 1
        self._places = [(i - 1, 1) if self._stack else (0, i) for i in indexes]  # file from 0, its band from 1
        self._masked = [
            place
            for place in sorted({file for file, _ in self._places})
            if files[place].alpha is not None or (nodata.use_tag and not self._keeps_alpha(files[place].source))
        ]
        self.block_height = max(file.block_height for file in files)
        sources = [(files[file].source, band) for file, band in self._places]
        dtypes = [source.dtypes[0 if has_palette(source) else band - 1] for source, band in sources]
        self._dtype = np.dtype(common_dtype(dtypes))
        self._values = [_nodata(nodata, source, band) for source, band in sources]

    def rows(self, start: int, stop: int) -> Array:
        """Rows of the kept bands with their validity as a last band of the same dtype (1 valid, 0 not).

        Pixels that are not valid are set to 0 in all bands: what a nodata pixel holds (-9999, NaN) is no measurement
        and must not reach a network. In a stack the same goes for each band where its own file holds no data; within
        one file the nodata value in some bands alone (0 in a dark red) may be a measurement.
        """
        rows = np.empty((len(self._places) + 1, stop - start, self.grid.width), dtype=self._dtype)
        bands, valid = rows[:-1], np.ones(rows.shape[1:], dtype=bool)
        self._fill(bands, start, stop)
        hidden = {place: self._files[place].masked(start, stop) for place in self._masked}
        lacks = [
            _either(band == value if value is not None else None, hidden.get(file))
            for band, value, (file, _) in zip(bands, self._values, self._places, strict=True)
        ]
        known = [lack for lack in lacks if lack is not None]
        if known and self._rules.match == "any":
            valid &= ~np.logical_or.reduce(known)
        elif len(known) == len(lacks):
            valid &= ~np.logical_and.reduce(known)
        if self._dtype.kind == "f":
            for band in bands:
                valid &= np.isfinite(band)
        if self._rules.alpha is not None:
            valid &= self._band(self._rules.alpha, start, stop) > 0
        for band, lack in zip(bands, lacks, strict=True):
            if self._stack and lack is not None:
                band[lack] = 0
        if not valid.all():
            bands[:, ~valid] = 0
        rows[-1] = valid
        return rows

    def _fill(self, bands: Array, start: int, stop: int) -> None:
        """Read into [C,rows,width]; the blocks of one file are decoded once for all of its bands."""
        if self._stack:
            for place, (file, index) in enumerate(self._places):
                self._files[file].fill(bands[place : place + 1], [index], start, stop)
            return
        image = self._files[0]
        if has_palette(image.source):
            colors = expand(image.source, image.read([1], start, stop)[0])
            bands[:] = colors[[index - 1 for index in self._indexes]]
        else:
            image.fill(bands, self._indexes, start, stop)

    def _band(self, index: int, start: int, stop: int) -> Array:
        """Rows [rows,width] of band ``index``, which need not be a kept one."""
        file, band = (self._files[index - 1], 1) if self._stack else (self._files[0], index)
        rows: Array = file.read([band], start, stop)[0]
        return rows

    def _keeps_alpha(self, source: DatasetReader) -> bool:
        """Whether a band to keep is tagged as alpha: writers tag a fourth band so although it is near infrared."""
        if self._stack or has_palette(source):
            return False
        return any(source.colorinterp[index - 1] == ColorInterp.alpha for index in self._indexes)


def _either(one: Array | None, other: Array | None) -> Array | None:
    if one is None or other is None:
        return other if one is None else one
    both: Array = one | other
    return both
