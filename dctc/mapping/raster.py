"""Scenes read row by row, maps written row by row on the same grid: GeoTIFFs that are whole or absent."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from shards.errors import InputError
from shards.manifest import ClassInfo

BLOCK = 256  # side of a map's internal tiles; rows are written in whole blocks, so each block is compressed once
SIDECAR = ".aux.xml"  # GDAL's own sidecar: what GeoTIFF tags cannot hold


class Scene:
    """A raster opened for reading from top to bottom; a context manager.

    Args:
        path: any raster that GDAL reads.
        names: bands that the model wants, in its order.
        dtype: numpy name of the values that the model was trained on.
        bands: which bands of the file they are (from 1); by default the file's band descriptions decide when they hold
            all of ``names``, else the position, alpha left out unless the model wants as many bands as there are.
        nodata: value of pixels without data, for files that do not say so themselves.

    Raises:
        InputError: when the file cannot be opened, or its bands or dtype are not the model's.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        dtype: str,
        bands: Sequence[int] | None = None,
        nodata: float | None = None,
    ) -> None:
        self.path = path
        self._nodata = nodata
        try:
            self.file = _quiet_open(path)
        except (RasterioError, OSError) as error:
            raise InputError(f"{path}: cannot be opened as a raster: {_cause(error)}") from None
        try:
            self.indexes = self._select(list(names), bands)
            self._check_dtype(dtype)
        except BaseException:
            self.file.close()
            raise
        self.height: int = self.file.height
        self.width: int = self.file.width

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Rows ``start`` to ``stop``: values [bands, rows, width] and which pixels have data, bool [rows, width].

        A pixel has no data when the nodata value stands in all bands read, where the mask or the alpha band is 0, and
        where a value is not finite.

        Raises:
            InputError: when the file is damaged or ends early.
        """
        window = Window(0, start, self.width, stop - start)
        try:
            # by default GDAL greys out the rest of a JPEG that ends early
            with rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING="YES"):
                values = self.file.read(self.indexes, window=window)
                valid = self._mask(values, window)
        except (RasterioError, OSError) as error:
            raise InputError(
                f"{self.path}: cannot be read between rows {start} and {stop}; "
                f"the file is damaged or incomplete, copy it again: {_cause(error)}"
            ) from None
        return values, valid

    def georeferencing(self) -> dict[str, Any]:
        """Keywords that place a new file on the scene's grid: CRS and transform, control points or RPCs."""
        points, points_crs = self.file.gcps
        place: dict[str, Any] = {"crs": self.file.crs, "transform": self.file.transform}
        if points:
            place = {"crs": points_crs, "gcps": points}
        if self.file.rpcs is not None:
            place["rpcs"] = self.file.rpcs
        return place

    def _mask(self, values: NDArray[Any], window: Window) -> NDArray[np.bool_]:
        valid = np.isfinite(values).all(axis=0) if values.dtype.kind == "f" else np.ones(values.shape[1:], bool)
        flags = self.file.mask_flag_enums[self.indexes[0] - 1]
        if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
            valid &= self.file.read_masks(self.indexes[0], window=window) > 0
        elif self._nodata is not None:
            valid &= (values != self._nodata).any(axis=0)
        elif any(MaskFlags.nodata in self.file.mask_flag_enums[i - 1] for i in self.indexes):
            valid &= (self.file.read_masks(self.indexes, window=window) > 0).any(axis=0)
        if self._alpha and self._alpha not in self.indexes:
            valid &= self.file.read(self._alpha, window=window) > 0
        return np.asarray(valid, bool)

    @property
    def _alpha(self) -> int | None:
        """The alpha band. GDAL calls the fourth of four 8-bit bands alpha unasked: one with another name is none."""
        for index, kind, name in zip(self.file.indexes, self.file.colorinterp, self.file.descriptions, strict=True):
            if kind == ColorInterp.alpha and (name or "alpha").strip().casefold() == "alpha":
                return int(index)
        return None

    def _select(self, names: list[str], bands: Sequence[int] | None) -> list[int]:
        if bands is not None:
            return self._chosen(names, list(bands))
        own = [index for index in self.file.indexes if index != self._alpha or self.file.count == len(names)]
        described = [(self.file.descriptions[index - 1] or "").strip().casefold() for index in own]
        wanted = [name.strip().casefold() for name in names]
        known = set(wanted) & set(described)
        if known == set(wanted) and all(described.count(name) == 1 for name in wanted):
            return [own[described.index(name)] for name in wanted]
        elsewhere = known and any(name and name != want for name, want in zip(described, wanted, strict=False))
        if elsewhere or len(own) != len(names):
            raise InputError(
                f"{self.path} has {len(own)} bands ({self._band_list(own)}), but the model wants {len(names)} "
                f"({', '.join(names)}): give a scene of these bands, or say which of its bands they are"
            )
        return own

    def _chosen(self, names: list[str], bands: list[int]) -> list[int]:
        if len(bands) != len(names) or not set(bands) <= set(self.file.indexes):
            raise InputError(
                f"bands {bands} of {self.path}, which has {self.file.count} ({self._band_list(self.file.indexes)}), "
                f"do not fit the model's {len(names)} ({', '.join(names)}): name one band for each, counted from 1"
            )
        return bands

    def _band_list(self, indexes: Sequence[int]) -> str:
        return ", ".join(self.file.descriptions[i - 1] or self.file.colorinterp[i - 1].name for i in indexes)

    def _check_dtype(self, dtype: str) -> None:
        for index in self.indexes:
            found = self.file.dtypes[index - 1]
            if found != dtype:
                raise InputError(
                    f"{self.path}: band {index} is {found}, but the model was trained on {dtype} values; convert the "
                    f"scene the way the training scenes were made (see gdal_translate -ot and -scale), "
                    f"or train a model on {found} scenes"
                )


@dataclass(frozen=True)
class Layer:
    """What one output file holds. ``bands`` describe its bands; ``scale`` times a stored value is the real one."""

    suffix: str
    dtype: str
    bands: tuple[str, ...]
    nodata: float
    predictor: int  # of the compression: 1 none, 2 differences of integers, 3 of floats
    scale: float | None = None
    palette: tuple[ClassInfo, ...] = ()


class RowWriter:
    """One GeoTIFF on a scene's grid, written from top to bottom under a temporary name in the same folder.

    Nothing has the final name before :meth:`publish`, and then all of it has.
    """

    def __init__(self, final: Path, scene: Scene, layer: Layer) -> None:
        self.final = final
        self.part = final.with_name(f".{final.name}.{socket.gethostname()}-{os.getpid()}.part")
        self._scene = scene
        self._layer = layer
        self._rows = np.empty((len(layer.bands), BLOCK, scene.width), layer.dtype)  # waiting for their block to be full
        self._waiting = 0
        self._written = 0
        _clear_stale(final)
        try:
            self._file = _quiet_open(self.part, "w", **self._profile())
            self._describe()
        except (RasterioError, OSError) as error:
            self.discard()
            raise self._unwritable(error) from None

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
            self._verify()
            self._write_sidecar()
            _sync(self.part)
        except (RasterioError, OSError) as error:
            raise self._unwritable(error) from None

    def publish(self) -> None:
        """Give the finished file its final name, in place of an older one."""
        part, final = _sidecar(self.part), _sidecar(self.final)
        try:
            if part.exists():
                _sync(part)
                part.replace(final)
            else:
                final.unlink(missing_ok=True)  # an older map's statistics or CRS do not belong to this one
            self.part.replace(self.final)
            _sync(self.final.parent)
        except OSError as error:
            raise self._unwritable(error) from None

    def discard(self) -> None:
        """Close and remove the temporary file; harmless after :meth:`publish`."""
        file = getattr(self, "_file", None)
        if file is not None and not file.closed:
            with contextlib.suppress(RasterioError, OSError):
                file.close()
        for path in (self.part, _sidecar(self.part)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        if not self._waiting:
            return
        window = Window(0, self._written, self._scene.width, self._waiting)
        try:
            self._file.write(self._rows[:, : self._waiting], window=window)
        except (RasterioError, OSError) as error:
            raise self._unwritable(error) from None
        self._written += self._waiting
        self._waiting = 0

    def _profile(self) -> dict[str, Any]:
        return {
            "driver": "GTiff", "width": self._scene.width, "height": self._scene.height,
            "count": len(self._layer.bands), "dtype": self._layer.dtype, "nodata": self._layer.nodata,
            "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "interleave": "band",
            "compress": "deflate", "predictor": self._layer.predictor, "bigtiff": "IF_SAFER",
            **self._scene.georeferencing(),
        }  # fmt: skip

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
        with _quiet_open(self.part) as file:
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
        with _quiet_open(self.part) as file:
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
            f"{self.final}: cannot be written; choose a folder that is writable and has room: {_cause(error)}"
        )


class MapSet:
    """The output files of one scene; a context manager that publishes all of them, or on any error none.

    Args:
        folder: made when missing.
        scene: an open scene; its name without the extension begins the files' names.
        layers: what to write; the last one is published last.

    Raises:
        InputError: when the folder or the files cannot be written.
    """

    def __init__(self, folder: Path, scene: Scene, layers: Sequence[Layer]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: this output folder cannot be made: {error.strerror}") from None
        self.writers: list[RowWriter] = []
        try:
            for layer in layers:
                self.writers.append(RowWriter(folder / f"{scene.path.stem}_{layer.suffix}.tif", scene, layer))
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
                for writer in self.writers:
                    writer.finish()
                for writer in self.writers:
                    writer.publish()
        finally:
            self._discard()

    def append(self, rows: Sequence[NDArray[Any]]) -> None:
        """Add rows to every file, in the order of the layers."""
        for writer, values in zip(self.writers, rows, strict=True):
            writer.append(values)

    def _discard(self) -> None:
        for writer in self.writers:
            writer.discard()


def _quiet_open(path: Path, mode: str = "r", **profile: Any) -> Any:
    """Open with rasterio; a scene without georeferencing is normal here, so no warning about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, mode, **profile)


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ or error


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_stale(final: Path) -> None:
    """Remove temporary files that killed processes of this machine left beside ``final``."""
    host = socket.gethostname()
    for path in final.parent.glob(f".{glob.escape(final.name)}.{glob.escape(host)}-*.part*"):
        pid = path.name.removeprefix(f".{final.name}.{host}-").split(".")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)
