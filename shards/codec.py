"""One tile <-> bytes.

Images are GeoTIFFs of one strip, compressed by zstd: uint8 pixel-interleaved with predictor 2; uint16 and int16
band-interleaved without predictor; float32 band-interleaved with predictor 3. A tile that is not wholly valid carries
GDAL's internal mask. Labels are deflated GeoTIFFs of one strip. All are lossless and open in any GIS.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.transform import Affine

from shards.errors import InputError

# Plain photographs and masks without georeference are ordinary input.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

DTYPES = ("uint8", "uint16", "int16", "float32")

_IMAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "uint8": {"interleave": "pixel", "predictor": 2},
    "uint16": {"interleave": "band"},
    "int16": {"interleave": "band"},
    "float32": {"interleave": "band", "predictor": 3},
}


def encode_image(
    array: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_] | None = None,
    crs_wkt: str | None = None,
    transform: Affine | None = None,
) -> bytes:
    """GeoTIFF of an image [C,H,W] of one of :data:`DTYPES`; ``valid`` [H,W] is written as a mask unless it is all true.

    Raises:
        InputError: when the dtype is not one of :data:`DTYPES`.
    """
    options = _IMAGE_OPTIONS.get(str(array.dtype))
    if options is None:
        raise InputError(f"images of {array.dtype} are not supported: convert them to one of {', '.join(DTYPES)}")
    mask = None if valid is None or valid.all() else valid
    return _encode(array, mask, crs_wkt, transform, compress="zstd", **options)


def encode_label(array: npt.NDArray[np.uint8], crs_wkt: str | None = None, transform: Affine | None = None) -> bytes:
    """GeoTIFF of class ids, uint8 [H,W]."""
    return _encode(array[None], None, crs_wkt, transform, compress="deflate")


def _encode(
    array: npt.NDArray[Any],
    mask: npt.NDArray[np.bool_] | None,
    crs_wkt: str | None,
    transform: Affine | None,
    **options: Any,
) -> bytes:
    count, height, width = array.shape
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": str(array.dtype),
        "blockysize": height,
        "alpha": "NO",  # or a fourth 8-bit band would be tagged as alpha and be taken for the mask
        "crs": CRS.from_wkt(crs_wkt) if crs_wkt else None,
        "transform": transform,
        **options,
    }
    # Without PAM nothing that GeoTIFF cannot hold is written beside the file, where it would leak.
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, GDAL_PAM_ENABLED=False), MemoryFile() as memory:
        with memory.open(**profile) as target:
            target.write(array)
            if mask is not None:
                target.write_mask(mask)
        return bytes(memory.read())


def read_image(
    codec: str, data: bytes, mask: bytes | None, image: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
) -> None:
    """Decode an image member into ``image`` [C,S,S] and its validity into ``valid`` [S,S], in place.

    ``codec`` is ``Manifest.codec["image"]``; ``mask`` the bytes of the tile's mask member, None when it has none.

    Raises:
        InputError: when the bytes are not of that codec, shape or dtype.
    """
    array, inside = decode_image(data)
    image[...] = array
    valid[...] = True if inside is None else inside


def read_label(codec: str, data: bytes, label: npt.NDArray[np.uint8]) -> None:
    """Decode a label member into ``label`` uint8 [S,S], in place.

    Raises:
        InputError: when the bytes are not of that codec or shape.
    """
    label[...] = decode_label(data)


def decode_image(data: bytes) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Image [C,H,W] and its validity [H,W], which is None for a wholly valid tile.

    Raises:
        InputError: when the bytes are no readable GeoTIFF.
    """
    with _opened(data) as source:
        array = source.read()
        if MaskFlags.per_dataset not in source.mask_flag_enums[0]:
            return array, None
        return array, source.read_masks(1).astype(bool)


def decode_label(data: bytes) -> npt.NDArray[np.uint8]:
    """Class ids, uint8 [H,W].

    Raises:
        InputError: when the bytes are no readable GeoTIFF.
    """
    with _opened(data) as source:
        label: npt.NDArray[np.uint8] = source.read(1)
        return label


@contextmanager
def _opened(data: bytes) -> Iterator[DatasetReader]:
    try:
        with MemoryFile(data) as memory, memory.open() as source:
            yield source
    except RasterioError as error:
        raise InputError(f"a tile of {len(data)} bytes cannot be decoded: {error}") from None
