"""Whether two rasters lie on one grid, and how one is brought onto the grid of another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import rasterio.warp
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import CRSError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterWindow

from shards.errors import InputError
from shards.rasters import Array, block_height, expand, has_mask, has_palette, naming, place_of

_TOLERATED = 0.5  # pixels by which the corners of one grid may lie apart


@dataclass(frozen=True)
class Grid:
    """The pixels of a raster on the ground; the identity as transform means that nothing is known of their place."""

    height: int
    width: int
    transform: Affine
    crs: CRS | None

    @classmethod
    def of(cls, source: DatasetReader) -> Grid:
        """The grid of an open raster."""
        return cls(source.height, source.width, source.transform, source.crs or None)

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Coordinates of the four corners in the grid's CRS, in order around it."""
        places = [(0, 0), (self.width, 0), (self.width, self.height), (0, self.height)]
        return [place_of(self.transform, col, row) for col, row in places]

    def shift(self, other: Grid) -> float:
        """Pixels by which the corners of a raster of the same size lie away from here; 0 where nobody knows.

        The corners are compared in this grid's CRS, so a CRS of another name is no difference by itself.
        """
        if self.transform.is_identity or other.transform.is_identity:
            return 0.0
        theirs = other.corners
        if self.crs and other.crs and self.crs != other.crs:
            try:
                xs, ys = rasterio.warp.transform(other.crs, self.crs, *zip(*theirs, strict=True))
            except CRSError:
                return math.inf
            theirs = list(zip(xs, ys, strict=True))
        apart = max(math.dist(mine, their) for mine, their in zip(self.corners, theirs, strict=True))
        return apart / math.sqrt(abs(self.transform.determinant)) if math.isfinite(apart) else math.inf

    def same_as(self, other: Grid) -> bool:
        """Whether both have one size and their corners lie at most half a pixel apart."""
        return (self.height, self.width) == (other.height, other.width) and self.shift(other) <= _TOLERATED

    def check_can_take(self, path: object, other: Grid) -> None:
        """Raise unless a raster of the grid ``other`` can be resampled onto this one."""
        georeferenced = not (self.transform.is_identity or other.transform.is_identity)
        if not georeferenced or (self.crs is None) != (other.crs is None):
            raise InputError(
                f"{path}: cannot be resampled onto its image's grid, because one of the two has no georeference or no "
                "CRS: add it to the file"
            )


@dataclass(frozen=True)
class OnGrid:
    """A raster read as if it lay on some grid; ``alpha`` is the band that tells where a warped one has data."""

    source: DatasetReader  # the file: its tags, colour table and types
    pixels: DatasetReader | WarpedVRT
    alpha: int | None

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.source.name)

    @property
    def block_height(self) -> int:
        """Rows that are best read together."""
        return block_height(self.pixels)

    def read(self, indexes: list[int], start: int, stop: int) -> Array:
        """Rows of bands, [C,rows,width], in the file's dtype."""
        with naming(self.name):
            rows: Array = self.pixels.read(indexes, window=self._window(start, stop))
        return rows

    def fill(self, rows: Array, indexes: list[int], start: int, stop: int) -> None:
        """Read rows of bands into [C,rows,width], whose dtype may be a wider one than the file's."""
        with naming(self.name):
            if {self.source.dtypes[index - 1] for index in indexes} == {str(rows.dtype)}:
                self.pixels.read(indexes, window=self._window(start, stop), out=rows)
            else:
                rows[:] = self.pixels.read(indexes, window=self._window(start, stop))

    def colors(self, start: int, stop: int) -> Array:
        """Rows of colours, uint8 [3 or 4,rows,width]; a colour table is expanded, a fourth band is transparency."""
        if has_palette(self.source):
            colors = expand(self.source, self.read([1], start, stop)[0])
        else:
            colors = self.read(list(range(1, min(self.source.count, 4) + 1)), start, stop)
        return colors

    def masked(self, start: int, stop: int) -> Array | None:
        """Where the file's mask or alpha, or its border once warped, says "no data"; bool [rows,width] or None."""
        if self.alpha is None and not has_mask(self.source):
            return None
        with naming(self.name):
            window = self._window(start, stop)
            if self.alpha is None:
                opaque = self.pixels.read_masks(1, window=window)
            else:
                opaque = self.pixels.read(self.alpha, window=window)
        hidden: Array = opaque == 0
        return hidden

    def _window(self, start: int, stop: int) -> RasterWindow:
        return RasterWindow(0, start, self.pixels.width, stop - start)


@contextmanager
def on_grid(source: DatasetReader, grid: Grid, resampling: str | None, nodata: float | None = None) -> Iterator[OnGrid]:
    """The raster as it is, or with ``resampling`` warped onto ``grid``.

    Pixels of ``nodata``, and those that the file's mask or alpha hides, take no part in the warping.
    """
    if resampling is None:
        yield OnGrid(source, source, None)
        return
    alpha = next((i for i, kind in enumerate(source.colorinterp, 1) if kind == ColorInterp.alpha), None)
    with ExitStack() as stack:
        with naming(source.name):
            vrt = WarpedVRT(
                source,
                crs=grid.crs,
                transform=grid.transform,
                height=grid.height,
                width=grid.width,
                resampling=Resampling[resampling],
                src_nodata=nodata,
                add_alpha=alpha is None,
                tolerance=1e-9,  # of a pixel: as good as exact, which rasterio does not let us ask for
            )
        stack.enter_context(vrt)
        yield OnGrid(source, vrt, alpha or source.count + 1)
