"""A class map as polygons: strip after strip into one GeoPackage, without a seam between strips."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rasterio.features import rasterize, shapes
from rasterio.transform import Affine

from dctc.mapping.raster import clear_stale, part_of, sync
from dctc.mapping.scene import Source
from shards.errors import InputError
from shards.manifest import IGNORE, ClassInfo

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

LAYER = "classes"
WRITE_AT_ONCE = 10_000  # polygons
TIME = "2000-01-01T00:00:00.000Z"  # GeoPackages hold when they were changed; the same map is to be the same bytes


@dataclass(frozen=True)
class PolygonOptions:
    """How a map becomes polygons, in pixels, so that it means the same in degrees and without a CRS.

    Attributes:
        minimum: smaller areas are left out, in square pixels.
        tolerance: how far an outline may move to have fewer corners; 0 keeps the pixels' stairs.
    """

    minimum: float = 16
    tolerance: float = 1

    def __post_init__(self) -> None:
        for option, value in (("--polygon-min-area", self.minimum), ("--polygon-tolerance", self.tolerance)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{option} {value}: give a number of pixels, 0 or more")


@dataclass
class _Region:
    """Pieces of one class that hang together and reach the last row seen."""

    code: int
    pieces: list[BaseGeometry] = field(default_factory=list)


class PolygonWriter:
    """Polygons of a scene's class map, written under a temporary name; see :class:`dctc.mapping.raster.Draft`.

    Pixels of a class that share a side are one polygon, however many strips it crosses; those that share a corner only
    are not. Memory holds one strip's polygons and those that reach its last row, so it grows with the largest region's
    outline, not with the scene.

    Raises:
        InputError: when shapely or pyogrio is missing, or control points alone place the scene.
    """

    def __init__(self, final: Path, scene: Source, classes: Sequence[ClassInfo], options: PolygonOptions) -> None:
        if any(importlib.util.find_spec(name) is None for name in ("pyogrio", "shapely")):
            raise InputError("--polygons needs shapely and pyogrio: pip install -c constraints.txt -e .[vector]")
        place = scene.georeferencing()
        if "gcps" in place:
            raise InputError(
                f"{scene.path}: --polygons needs a scene with a transform, and control points place this one; "
                "warp it first (gdalwarp), or leave --polygons out"
            )
        self.final = final
        # GDAL wants the extension
        self.part = part_of(final).with_name(f"{part_of(final).name}.gpkg")
        self._place: Affine = place["transform"]
        self._crs: str | None = place["crs"].to_wkt() if place["crs"] else None
        self._classes = classes
        self._options = options
        self._row = 0
        self._open: list[_Region] = []  # reach the last row seen
        self._under: NDArray[np.int32] = np.full(scene.width, -1, np.int32)  # that row: position in _open, -1 nodata
        self._ready: list[tuple[int, BaseGeometry]] = []
        self._begun = False
        clear_stale(final)

    def append(self, rows: NDArray[Any]) -> None:
        """Add class ids [1, n, width] below those already added; 255 is no polygon."""
        strip = np.ascontiguousarray(rows[0])
        height, width = strip.shape
        if not height:
            return
        from shapely.geometry import shape

        found = shapes(strip, strip != IGNORE, connectivity=4, transform=Affine.translation(0, self._row))
        pieces = [(shape(outline), int(code)) for outline, code in found]
        top = self._touching(pieces, 0 if self._row else None, height, width)
        bottom = self._touching(pieces, height - 1, height, width)
        self._row += height
        self._join(pieces, top, bottom)

    def finish(self) -> None:
        """Write what is open and put the file on the disk."""
        for region in self._open:
            self._close(region)
        self._open = []
        self._write()
        try:
            sync(self.part)
        except OSError as error:
            raise self._unwritable(error) from None

    def publish(self) -> None:
        """Give the finished file its final name, in place of an older one."""
        try:
            self.part.replace(self.final)
            sync(self.final.parent)
        except OSError as error:
            raise self._unwritable(error) from None

    def discard(self) -> None:
        """Remove the temporary file; harmless after :meth:`publish`."""
        for path in (self.part, self.part.with_name(f"{self.part.name}-journal")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _touching(
        self, pieces: Sequence[tuple[BaseGeometry, int]], row: int | None, height: int, width: int
    ) -> NDArray[np.int32]:
        """Which piece each pixel of a row of the strip belongs to, [width]; -1 for none."""
        if row is None or not pieces:
            return np.full(width, -1, np.int32)
        line = self._row + row
        near = [
            (piece, number) for number, (piece, _) in enumerate(pieces)
            if piece.bounds[1] <= line and piece.bounds[3] >= line + 1
        ]  # fmt: skip
        if not near:
            return np.full(width, -1, np.int32)
        burnt: NDArray[np.int32] = rasterize(
            near, (1, width), fill=-1, transform=Affine.translation(0, line), dtype="int32"
        )[0]
        return burnt

    def _join(
        self, pieces: Sequence[tuple[BaseGeometry, int]], top: NDArray[np.int32], bottom: NDArray[np.int32]
    ) -> None:
        """Put the pieces of a strip to the open regions that they continue, and close those that end."""
        old = len(self._open)
        codes = np.array([r.code for r in self._open] + [code for _, code in pieces], np.int32)
        parent = list(range(len(codes)))

        def root(node: int) -> int:
            while parent[node] != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        both = (self._under >= 0) & (top >= 0)
        for above, below in np.unique(np.stack([self._under[both], top[both] + old]), axis=1).T:
            if codes[above] == codes[below]:
                first, second = sorted((root(int(above)), root(int(below))))
                parent[second] = first
        regions: dict[int, _Region] = {}
        for node, code in enumerate(codes):
            region = regions.setdefault(root(node), _Region(int(code)))
            region.pieces.extend(self._open[node].pieces if node < old else [pieces[node - old][0]])
        going = {root(int(node) + old) for node in np.unique(bottom[bottom >= 0])}
        position = {}
        still: list[_Region] = []
        for node, region in regions.items():
            if node in going:
                position[node] = len(still)
                still.append(region)
            else:
                self._close(region)
        where = np.array([position.get(root(number + old), -1) for number in range(len(pieces))] + [-1], np.int32)
        self._under = where[bottom]  # -1, no piece, finds the last
        self._open = still

    def _close(self, region: _Region) -> None:
        import shapely

        whole = region.pieces[0] if len(region.pieces) == 1 else shapely.union_all(region.pieces)
        if whole.area >= self._options.minimum:
            self._ready.append((region.code, whole))
        if len(self._ready) >= WRITE_AT_ONCE:
            self._write()

    def _write(self) -> None:
        """Append what is ready; the first time also where nothing is, for a map without polygons is a file too."""
        if self._begun and not self._ready:
            return
        import pyogrio
        import shapely
        from pyogrio.errors import DataSourceError, FeatureError, GeometryError

        codes = np.array([code for code, _ in self._ready], np.int32)
        outlines = np.array([outline for _, outline in self._ready], object)
        areas = shapely.area(outlines) if len(outlines) else np.empty(0)
        if self._options.tolerance and len(outlines):
            outlines = shapely.simplify(outlines, self._options.tolerance, preserve_topology=True)
            outlines = shapely.make_valid(outlines, method="structure", keep_collapsed=False)
        names = np.array([self._classes[code].name for code in codes], object)
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": TIME})
        try:
            pyogrio.raw.write(
                self.part, shapely.to_wkb(shapely.transform(outlines, self._placed)), [codes, names, areas],
                np.array(["class_id", "class", "pixels"]), layer=LAYER, driver="GPKG", geometry_type="MultiPolygon",
                promote_to_multi=True, crs=self._crs, append=self._begun,
            )  # fmt: skip
        except (DataSourceError, FeatureError, GeometryError, OSError, RuntimeError) as error:
            raise self._unwritable(error) from None
        self._begun = True
        self._ready = []

    def _placed(self, corners: NDArray[np.float64]) -> NDArray[np.float64]:
        place = self._place
        x, y = corners[:, 0], corners[:, 1]
        return np.stack([place.a * x + place.b * y + place.c, place.d * x + place.e * y + place.f], axis=1)

    def _unwritable(self, error: Exception) -> InputError:
        return InputError(f"{self.final}: cannot be written; choose a folder that is writable and has room: {error}")
