"""Open rasters, with errors that name the file, and what their headers say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine

from shards.errors import InputError

Array = npt.NDArray[Any]


@contextmanager
def open_raster(path: Path) -> Iterator[DatasetReader]:
    """Open a raster.

    Raises:
        InputError: when it cannot be opened; names the file.
    """
    with naming(path):
        source = rasterio.open(path)
    with source:
        yield source


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn a failure to read inside the block into an InputError that names the file."""
    try:
        yield
    except RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: cannot be read, is it damaged or cut short? Replace the file ({reason})") from None


def band_count(source: DatasetReader) -> int:
    """Bands of a raster, where a colour table counts as the three bands that it expands to."""
    return 3 if has_palette(source) else source.count


def has_palette(source: DatasetReader) -> bool:
    """Whether the raster's one band holds places in a colour table."""
    return bool(source.count == 1 and source.colorinterp[0] == ColorInterp.palette)


def expand(source: DatasetReader, places: Array) -> Array:
    """Colours [4,H,W] (RGBA) of places in the source's colour table [H,W]."""
    table = np.zeros((256, 4), dtype=np.uint8)
    for place, color in source.colormap(1).items():
        table[place] = color
    return np.moveaxis(table[places], -1, 0)


def has_mask(source: DatasetReader) -> bool:
    """Whether the file says by a mask band, a mask file or an alpha channel where it holds no data."""
    return MaskFlags.per_dataset in source.mask_flag_enums[0]


def tagged_nodata(source: DatasetReader, index: int) -> float | None:
    """The nodata value that the file gives its band ``index`` (from 1), unless a mask overrules it."""
    return source.nodatavals[index - 1] if MaskFlags.nodata in source.mask_flag_enums[index - 1] else None


def block_height(source: DatasetReader) -> int:
    """Rows of the source's storage blocks."""
    return max(int(shape[0]) for shape in source.block_shapes)


def place_of(transform: Affine, col: float, row: float) -> tuple[float, float]:
    """Coordinates of the upper left corner of a pixel."""
    return (
        transform.a * col + transform.b * row + transform.c,
        transform.d * col + transform.e * row + transform.f,
    )
