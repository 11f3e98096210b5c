"""Maps written row by row on a scene's grid: cloud-optimised GeoTIFFs that are whole or absent."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import psutil
import rasterio.shutil
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # what rasterio.shutil.copy raises, and no public name has
from rasterio.errors import RasterioError
from rasterio.windows import Window

from dctc.mapping.scene import Source, cause, quiet_open
from shards.errors import InputError
from shards.manifest import ClassInfo

BLOCK = 256  # side of a map's internal tiles; rows are written in whole blocks, so each block is compressed once
SIDECAR = ".aux.xml"  # GDAL's own sidecar: what GeoTIFF tags cannot hold
FAILURES = (RasterioError, CPLE_BaseError, OSError)


@dataclass(frozen=True)
class Layer:
    """What one output file holds. ``bands`` describe its bands; ``scale`` times a stored value is the real one."""

    dtype: str
    bands: tuple[str, ...]
    nodata: float
    predictor: int  # of the compression: 1 none, 2 differences of integers, 3 of floats
    scale: float | None = None
    palette: tuple[ClassInfo, ...] = ()
    overviews: str = "average"  # how GDAL makes them: classes have no average


class Draft(Protocol):
    """A file that takes a scene's rows from top to bottom, and has its final name only after :meth:`publish`."""

    final: Path

    def append(self, rows: NDArray[Any]) -> None: ...
    def finish(self) -> None: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...


class RowWriter:
    """One GeoTIFF on a scene's grid, written from top to bottom under a temporary name in the same folder.

    A cloud-optimised file begins with its overviews, which need all rows; so the rows go into a plain file first, and
    :meth:`finish` makes the other out of it, in memory that does not grow with the scene. Nothing has the final name
    before :meth:`publish`, and then all of it has.
    """

    def __init__(self, final: Path, scene: Source, layer: Layer) -> None:
        self.final = final
        self.part = part_of(final)
        self._scene = scene
        self._layer = layer
        self._rows = np.empty((len(layer.bands), BLOCK, scene.width), layer.dtype)  # waiting for their block to be full
        self._waiting = 0
        self._written = 0
        clear_stale(final)
        try:
            self._file = quiet_open(self.part, "w", **self._profile())
            self._describe()
        except BaseException as error:
            self.discard()
            if isinstance(error, FAILURES):
                raise self._unwritable(error) from None
            raise

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows [bands, n, width] below those already added."""
        while rows.shape[1]:
            taken = min(BLOCK - self._waiting, rows.shape[1])
            self._rows[:, self._waiting : self._waiting + taken] = rows[:, :taken]
            self._waiting += taken
            rows = rows[:, taken:]
            if self._waiting == BLOCK:
                self._write()

    def finish(self) -> None:
        """Write what is waiting, close the file, see that all of it is there, and put it on the disk."""
        self._write()
        try:
            self._file.close()
            self._optimise()
            self._verify()
            self._write_sidecar()
            sync(self.part)
        except FAILURES as error:
            raise self._unwritable(error) from None

    def publish(self) -> None:
        """Give the finished file its final name, in place of an older one."""
        part, final = _sidecar(self.part), _sidecar(self.final)
        try:
            if part.exists():
                sync(part)
                part.replace(final)
            else:
                final.unlink(missing_ok=True)  # an older map's statistics or CRS do not belong to this one
            self.part.replace(self.final)
            sync(self.final.parent)
        except OSError as error:
            raise self._unwritable(error) from None

    def discard(self) -> None:
        """Close and remove the temporary file; harmless after :meth:`publish`."""
        file = getattr(self, "_file", None)
        if file is not None and not file.closed:
            with contextlib.suppress(*FAILURES):
                file.close()
        for path in self.part.parent.glob(f"{glob.escape(self.part.name)}*"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        if not self._waiting:
            return
        window = Window(0, self._written, self._scene.width, self._waiting)
        try:
            self._file.write(self._rows[:, : self._waiting], window=window)
        except FAILURES as error:
            raise self._unwritable(error) from None
        self._written += self._waiting
        self._waiting = 0

    def _profile(self) -> dict[str, Any]:
        return {
            "driver": "GTiff", "width": self._scene.width, "height": self._scene.height,
            "count": len(self._layer.bands), "dtype": self._layer.dtype, "nodata": self._layer.nodata,
            "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "interleave": "band",
            "compress": "deflate", "zlevel": 1, "predictor": self._layer.predictor, "bigtiff": "IF_SAFER",
            **self._scene.georeferencing(),
        }  # fmt: skip

    def _optimise(self) -> None:
        """Put the cloud-optimised file, with overviews, in the plain one's place."""
        optimised = self.part.with_name(f"{self.part.name}.cog")
        predictor = {1: "NO", 2: "STANDARD", 3: "FLOATING_POINT"}[self._layer.predictor]
        with quiet_open(self.part) as plain:
            rasterio.shutil.copy(
                plain, optimised, driver="COG", compress="deflate", predictor=predictor, blocksize=BLOCK,
                overview_resampling=self._layer.overviews, bigtiff="IF_SAFER",
            )  # fmt: skip
        _sidecar(self.part).unlink(missing_ok=True)
        if _sidecar(optimised).exists():
            _sidecar(optimised).replace(_sidecar(self.part))
        optimised.replace(self.part)

    def _describe(self) -> None:
        for index, name in enumerate(self._layer.bands, 1):
            self._file.set_band_description(index, name)
        if self._layer.scale is not None:
            self._file.scales = (self._layer.scale,) * len(self._layer.bands)
        if self._layer.palette:
            colors = {code: (*info.color, 255) for code, info in enumerate(self._layer.palette)}
            self._file.write_colormap(1, {**colors, int(self._layer.nodata): (0, 0, 0, 0)})
            self._file.update_tags(1, **{f"class_{code}": info.name for code, info in enumerate(self._layer.palette)})

    def _verify(self) -> None:
        """GDAL reports a full disk late or not at all: the last byte of every block must lie inside the file."""
        size = self.part.stat().st_size
        with quiet_open(self.part) as file:
            missing = 0
            for band in file.indexes:
                for row in range(-(-file.height // BLOCK)):
                    for column in range(-(-file.width // BLOCK)):
                        offset = file.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=band)
                        length = file.get_tag_item(f"BLOCK_SIZE_{column}_{row}", "TIFF", bidx=band)
                        missing += offset is None or length is None or int(offset) + int(length) > size
        if missing:
            raise OSError(f"{missing} blocks are missing; is the disk full?")

    def _write_sidecar(self) -> None:
        """Class names for the legend of GIS programs, and the CRS where GeoTIFF keys lost some of it."""
        path = _sidecar(self.part)
        root = ET.parse(path).getroot() if path.exists() else ET.Element("PAMDataset")
        with quiet_open(self.part) as file:
            kept = file.crs == self._profile()["crs"]
        if not kept and (crs := self._profile()["crs"]):
            ET.SubElement(root, "SRS").text = crs.to_wkt()
        if self._layer.palette:
            names = ET.SubElement(ET.SubElement(root, "PAMRasterBand", band="1"), "CategoryNames")
            for info in self._layer.palette:
                ET.SubElement(names, "Category").text = info.name
        if len(root):
            ET.indent(root)
            path.write_bytes(ET.tostring(root))

    def _unwritable(self, error: Exception) -> InputError:
        return InputError(
            f"{self.final}: cannot be written; choose a folder that is writable and has room: {cause(error)}"
        )


class MapSet:
    """The output files of one scene; a context manager that publishes all of them, or on any error none.

    Args:
        drafts: makers of the files, by kind; they run in order, so that one that fails takes the others along.
        first: called when all files are finished, before the first gets its final name.
        last: called when all files have their final names.
    """

    def __init__(
        self, drafts: Mapping[str, Callable[[], Draft]], first: Callable[[], None], last: Callable[[], None]
    ) -> None:
        self.drafts: dict[str, Draft] = {}
        self._first = first
        self._last = last
        try:
            for kind, make in drafts.items():
                self.drafts[kind] = make()
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> MapSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for draft in self.drafts.values():
                    draft.finish()
                self._first()
                for draft in self.drafts.values():
                    draft.publish()
                self._last()
        finally:
            self._discard()

    @property
    def kinds(self) -> list[str]:
        """Of the files."""
        return list(self.drafts)

    def append(self, kind: str, rows: NDArray[Any]) -> None:
        """Add rows [bands, n, width] to one of the files."""
        self.drafts[kind].append(rows)

    def _discard(self) -> None:
        for draft in self.drafts.values():
            draft.discard()


def make_folder(folder: Path) -> None:
    """Make an output folder where it is missing; raises :class:`InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: this output folder cannot be made: {error.strerror}") from None


def part_of(final: Path) -> Path:
    """The temporary name, in the same folder, under which this process writes ``final``."""
    return final.with_name(f".{final.name}.{socket.gethostname()}-{os.getpid()}.part")


def write_text(final: Path, text: str) -> None:
    """Write a small file, whole or not at all; raises :class:`InputError`."""
    part = part_of(final)
    clear_stale(final)
    try:
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.replace(final)
        sync(final.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{final}: cannot be written; choose a folder that is writable and has room: {error}"
        ) from None


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_stale(final: Path) -> None:
    """Remove temporary files that killed processes of this machine left beside ``final``."""
    host = socket.gethostname()
    for path in final.parent.glob(f".{glob.escape(final.name)}.{glob.escape(host)}-*.part*"):
        pid = path.name.removeprefix(f".{final.name}.{host}-").split(".")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)
