"""One tile <-> bytes.

- geotiff (any dtype): one strip, zstd. uint8 pixel-interleaved with predictor 2; uint16 and int16 band-interleaved;
  float32 band-interleaved with predictor 3. A tile that is not wholly valid carries GDAL's internal mask.
- npy (any dtype): numpy's own format 1.0, [C,H,W], uncompressed.
- jpeg (uint8, 1 or 3 bands): 4:4:4, lossy; without subsampling, since false colours are not luminance and chroma.
- png (uint8 or uint16, 1 to 4 bands): no band is alpha to it.

The last three hold no mask: a tile that is not wholly valid gets a second member, an 8-bit grey PNG, 255 valid and 0
not. Labels are deflated one-strip GeoTIFFs, npy [H,W] or 8-bit grey PNGs. All but jpeg are lossless.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import rasterio
from PIL import Image
from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.transform import Affine

from shards.errors import InputError

# Plain photographs and masks without georeference are ordinary input.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

DTYPES = ("uint8", "uint16", "int16", "float32")
SUFFIXES = {"geotiff": "tif", "npy": "npy", "jpeg": "jpg", "png": "png"}
LOSSY = ("jpeg",)
MASK_MEMBER = "mask.png"

_ACCEPTS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {  # dtypes and numbers of bands
    "jpeg": (("uint8",), (1, 3)),
    "png": (("uint8", "uint16"), (1, 2, 3, 4)),
}
# zstd's own default level; GDAL's, 9, takes two to four times as long to save at most 7 % (measured on Dubai, NAIP and
# Landsat 8), and reads no faster.
_ZSTD = {"compress": "zstd", "zstd_level": 3}
_IMAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "uint8": {"interleave": "pixel", "predictor": 2},
    "uint16": {"interleave": "band"},
    "int16": {"interleave": "band"},
    "float32": {"interleave": "band", "predictor": 3},
}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_GDAL_DRIVERS = {"geotiff": "GTiff", "png": "PNG"}


def member_name(what: str, codec: str) -> str:
    """Suffix of a tile's image or label member, such as ``image.tif``."""
    return f"{what}.{SUFFIXES[codec]}"


def holds_mask(codec: str) -> bool:
    """Whether an image of this codec carries its own validity."""
    return codec == "geotiff"


def encoder_versions(codec: str) -> list[str]:
    """The libraries that decide the bytes of images of this codec and of masks, with their versions."""
    libraries = [f"gdal {rasterio.__gdal_version__}"]
    if not holds_mask(codec):
        libraries.append(f"pillow {PIL.__version__}")
    return libraries


def check_codec(codec: str, dtype: str, bands: int) -> None:
    """Refuse images that a codec cannot hold.

    Raises:
        InputError: which names the codecs that can.
    """
    if not _accepts(codec, dtype, bands):
        dtypes, counts = _ACCEPTS[codec]
        fitting = ", ".join(name for name in SUFFIXES if _accepts(name, dtype, bands))
        raise InputError(
            f"codec.image {codec} holds {' or '.join(dtypes)} with {' or '.join(map(str, counts))} bands, these images "
            f"are {dtype} with {bands}: set codec.image to one of {fitting}"
        )


def _accepts(codec: str, dtype: str, bands: int) -> bool:
    dtypes, counts = _ACCEPTS.get(codec, (DTYPES, (bands,)))
    return dtype in dtypes and bands in counts


def encode_image(
    array: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_] | None = None,
    crs_wkt: str | None = None,
    transform: Affine | None = None,
    *,
    codec: str = "geotiff",
    quality: int = 95,
) -> bytes:
    """Bytes of an image [C,H,W] of one of :data:`DTYPES`.

    A GeoTIFF also keeps CRS, transform and ``valid`` [H,W], as a mask unless it is all true; the other codecs keep
    none of them. ``quality`` is that of jpeg.

    Raises:
        InputError: when the codec cannot hold that dtype or number of bands.
    """
    if str(array.dtype) not in DTYPES:
        raise InputError(f"images of {array.dtype} are not supported: convert them to one of {', '.join(DTYPES)}")
    check_codec(codec, str(array.dtype), len(array))
    if codec == "npy":
        return _encode_npy(array)
    if codec == "jpeg":
        return _encode_plain(np.moveaxis(array, 0, -1), "JPEG", quality=quality, subsampling="4:4:4")
    if codec == "png":
        return _encode_gdal(array, None, driver="PNG")
    mask = None if valid is None or valid.all() else valid
    return _encode_geotiff(array, mask, crs_wkt, transform, **_ZSTD, **_IMAGE_OPTIONS[str(array.dtype)])


def encode_mask(valid: npt.NDArray[np.bool_]) -> bytes:
    """PNG of the validity [H,W] of an image whose codec does not hold it."""
    return _encode_plain((valid.view(np.uint8) * np.uint8(255))[..., None], "PNG")


def encode_label(
    array: npt.NDArray[np.uint8],
    crs_wkt: str | None = None,
    transform: Affine | None = None,
    *,
    codec: str = "geotiff",
) -> bytes:
    """Bytes of class ids, uint8 [H,W]; a GeoTIFF keeps CRS and transform."""
    if codec == "npy":
        return _encode_npy(array)
    if codec == "png":
        return _encode_plain(array[..., None], "PNG")
    return _encode_geotiff(array[None], None, crs_wkt, transform, compress="deflate")


def _encode_npy(array: npt.NDArray[Any]) -> bytes:
    return _npy_header(str(array.dtype), array.shape) + array.tobytes()


@functools.cache
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What numpy writes before the values of a little-endian array in C order, format 1.0."""
    buffer = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(buffer, {"descr": description, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _encode_plain(pixels: npt.NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    """An ordinary 8-bit picture of pixels [H,W,1 or 3]."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def _encode_geotiff(
    array: npt.NDArray[Any],
    mask: npt.NDArray[np.bool_] | None,
    crs_wkt: str | None,
    transform: Affine | None,
    **options: Any,
) -> bytes:
    return _encode_gdal(
        array,
        mask,
        driver="GTiff",
        blockysize=array.shape[1],
        alpha="NO",  # or a fourth 8-bit band would be tagged as alpha and be taken for the mask
        crs=CRS.from_wkt(crs_wkt) if crs_wkt else None,
        transform=transform,
        **options,
    )


def _encode_gdal(array: npt.NDArray[Any], mask: npt.NDArray[np.bool_] | None, **profile: Any) -> bytes:
    count, height, width = array.shape
    profile |= {"count": count, "height": height, "width": width, "dtype": str(array.dtype)}
    # Without PAM nothing that the format cannot hold is written beside the file, where it would leak.
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
    valid[...] = True
    if codec == "npy":
        _read_npy(data, image)
    elif codec == "jpeg":
        _read_jpeg(data, image)
    else:
        with _opened(codec, data) as source:
            _check_like(source, image)
            source.read(out=image)
            if codec == "geotiff" and MaskFlags.per_dataset in source.mask_flag_enums[0]:
                _read_validity(source.read_masks, valid)
    if mask is not None:
        with _opened("png", mask) as source:
            _check_like(source, valid.view(np.uint8)[None])
            _read_validity(source.read, valid)
        if codec in LOSSY:
            image[:, ~valid] = 0  # as it was before it was compressed


def read_label(codec: str, data: bytes, label: npt.NDArray[np.uint8]) -> None:
    """Decode a label member into ``label`` uint8 [S,S], in place.

    Raises:
        InputError: when the bytes are not of that codec or shape.
    """
    if codec == "npy":
        _read_npy(data, label)
        return
    with _opened(codec, data) as source:
        _check_like(source, label[None])
        source.read(1, out=label)


def _read_npy(data: bytes, out: npt.NDArray[Any]) -> None:
    header = _npy_header(str(out.dtype), out.shape)
    if not data.startswith(header) or len(data) != len(header) + out.nbytes:
        raise InputError(f"a tile of {len(data)} bytes cannot be decoded: it is no npy of {out.dtype} {out.shape}")
    np.copyto(out, np.frombuffer(data, out.dtype.newbyteorder("<"), offset=len(header)).reshape(out.shape))


def _read_jpeg(data: bytes, out: npt.NDArray[Any]) -> None:
    with _decoding(data), Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
        pixels = np.asarray(picture)
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    if planes.shape != out.shape or out.dtype != np.uint8:
        raise InputError(f"a tile of {len(data)} bytes is uint8 {planes.shape} instead of {out.dtype} {out.shape}")
    np.copyto(out, planes)


def _read_validity(read: Any, valid: npt.NDArray[np.bool_]) -> None:
    """Read a mask of 0 and 255 into a bool array by way of its own bytes."""
    flags = valid.view(np.uint8)
    read(1, out=flags)
    np.minimum(flags, 1, out=flags)


def _check_like(source: DatasetReader, out: npt.NDArray[Any]) -> None:
    """GDAL would resample to another shape and convert to another dtype without a word."""
    found, dtypes = (source.count, source.height, source.width), set(source.dtypes)
    if found != out.shape or dtypes != {str(out.dtype)}:
        raise InputError(f"a tile is {' '.join(dtypes)} {found} instead of {out.dtype} {out.shape}")


def decode_image(
    data: bytes, codec: str = "geotiff", mask: bytes | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Image [C,H,W] and its validity [H,W], which is None for a wholly valid tile; shape and dtype as they are stored.

    Raises:
        InputError: when the bytes are not of that codec.
    """
    image = _like_stored(codec, data)
    valid = np.empty(image.shape[1:], dtype=np.bool_)
    read_image(codec, data, mask, image, valid)
    return image, None if valid.all() else valid


def decode_label(data: bytes, codec: str = "geotiff") -> npt.NDArray[np.uint8]:
    """Class ids, uint8 [H,W].

    Raises:
        InputError: when the bytes are not of that codec.
    """
    stored = _like_stored(codec, data)
    label: npt.NDArray[np.uint8] = stored if stored.ndim == 2 else stored[0]
    read_label(codec, data, label)
    return label


def _like_stored(codec: str, data: bytes) -> npt.NDArray[Any]:
    """An empty array of the shape and dtype of what the bytes hold."""
    if codec == "npy":
        with _decoding(data):
            header = io.BytesIO(data)
            np.lib.format.read_magic(header)
            shape, _, dtype = np.lib.format.read_array_header_1_0(header)
            if math.prod(shape) * dtype.itemsize > len(data):
                raise ValueError("cut short")
        return np.empty(shape, dtype)
    if codec == "jpeg":
        with _decoding(data), Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            return np.empty((len(picture.getbands()), picture.height, picture.width), np.uint8)
    with _opened(codec, data) as source:
        return np.empty((source.count, source.height, source.width), source.dtypes[0])


@contextmanager
def _opened(codec: str, data: bytes) -> Iterator[DatasetReader]:
    # Where the tile lies is not looked at: to make sense of a CRS takes as long as to decode the pixels.
    options = {"georef_sources": "NONE"} if codec == "geotiff" else {}
    with _decoding(data):
        if not data or (codec == "png" and not data.endswith(_PNG_END)):  # GDAL fills up a PNG that is cut short
            raise ValueError("cut short")
        with MemoryFile(data) as memory, memory.open(driver=_GDAL_DRIVERS[codec], **options) as source:
            yield source


@contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    try:
        yield
    except (RasterioError, OSError, ValueError) as error:
        raise InputError(f"a tile of {len(data)} bytes cannot be decoded: {error}") from None
