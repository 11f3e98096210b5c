"""A scene opened for reading row by row: its bands, its pixels with data, its place on the ground."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from shards.errors import InputError


class Source(Protocol):
    """What is mapped: rows of pixels from top to bottom, and where they lie. :class:`Scene` is one."""

    @property
    def path(self) -> Path: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Rows ``start`` to ``stop``: values [bands, rows, width] and which pixels have data, bool [rows, width]."""
        ...

    def georeferencing(self) -> dict[str, Any]:
        """Keywords that place a new file on the scene's grid."""
        ...


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
            self.file = quiet_open(path)
        except (RasterioError, OSError) as error:
            raise InputError(f"{path}: cannot be opened as a raster: {cause(error)}") from None
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
                f"the file is damaged or incomplete, copy it again: {cause(error)}"
            ) from None
        return values, valid

    def georeferencing(self) -> dict[str, Any]:
        """Keywords that place a new file on the scene's grid: CRS and transform, control points or RPCs."""
        return georeferencing(self.file)

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
                f"({', '.join(names)}): give a scene of these bands, or say which of its bands they are, "
                "as --bands 1,2,3"
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


def georeferencing(file: Any) -> dict[str, Any]:
    """Keywords that place a new file where an open one lies: CRS and transform, control points or RPCs."""
    points, points_crs = file.gcps
    place: dict[str, Any] = {"crs": file.crs, "transform": file.transform}
    if points:
        place = {"crs": points_crs, "gcps": points}
    if file.rpcs is not None:
        place["rpcs"] = file.rpcs
    return place


def quiet_open(path: Path, mode: str = "r", **profile: Any) -> Any:
    """Open with rasterio; a scene without georeferencing is normal here, so no warning about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, mode, **profile)


def cause(error: BaseException) -> BaseException:
    """GDAL's own error, where rasterio wrapped it."""
    return error.__cause__ or error
