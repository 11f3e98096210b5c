from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from shards.codec import DTYPES, decode_image, decode_label, encode_image, encode_label
from shards.errors import InputError
from tests.data.layouts import random_ids, random_image

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

# A transverse Mercator of its own: no register has a code for it.
LOCAL = CRS.from_proj4(
    "+proj=tmerc +lat_0=11.5 +lon_0=7.25 +k=0.9997 +x_0=1234 +y_0=567 +ellps=bessel +units=m"
).to_wkt()
PLACE = Affine(0.05, 0, 366676.8, 0, -0.05, 5808190.35)


def noise(bands: int, dtype: str) -> npt.NDArray[Any]:
    generator = np.random.default_rng(bands)
    if dtype == "float32":
        return generator.normal(0, 1e6, (bands, 48, 48)).astype(np.float32)
    info = np.iinfo(dtype)
    return generator.integers(info.min, info.max, (bands, 48, 48), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 8])
def test_images_are_lossless(dtype: str, bands: int) -> None:
    for array in (noise(bands, dtype), random_image(bands, 48, 48, 0, dtype)):
        valid = np.random.default_rng(1).random((48, 48)) > 0.3
        for mask in (None, valid):
            image, back = decode_image(encode_image(array, mask, LOCAL, PLACE))
            assert image.dtype == array.dtype
            assert np.array_equal(image, array)
            assert (back is None) == (mask is None)
            assert back is None or np.array_equal(back, valid)


def test_a_wholly_valid_tile_has_no_mask() -> None:
    array = noise(3, "uint8")
    assert encode_image(array, np.ones((48, 48), dtype=bool)) == encode_image(array, None)


def test_crs_without_a_code_and_a_fine_transform_survive() -> None:
    for data in (
        encode_image(noise(4, "uint16"), None, LOCAL, PLACE),
        encode_label(random_ids(6, 48, 48, 0), LOCAL, PLACE),
    ):
        with MemoryFile(data) as memory, memory.open() as source:
            assert source.crs.to_epsg() is None
            assert source.crs == CRS.from_wkt(LOCAL)
            assert tuple(source.transform) == tuple(PLACE)
            assert source.block_shapes[0] == (48, 48)
            assert str(source.compression) in ("Compression.zstd", "Compression.deflate")


@pytest.mark.parametrize("crs", [None, LOCAL, "EPSG:32633"])
def test_labels_are_lossless(crs: str | None) -> None:
    ids = random_ids(200, 64, 64, 3)
    assert np.array_equal(decode_label(encode_label(ids, crs and CRS.from_user_input(crs).to_wkt(), PLACE)), ids)


def test_same_tile_same_bytes() -> None:
    valid = np.eye(48, dtype=bool)
    assert encode_image(noise(3, "uint8"), valid, LOCAL, PLACE) == encode_image(noise(3, "uint8"), valid, LOCAL, PLACE)


def test_bad_tiles_are_named() -> None:
    with pytest.raises(InputError, match="images of float64 are not supported"):
        encode_image(np.zeros((1, 8, 8)))
    with pytest.raises(InputError, match="a tile of 4 bytes cannot be decoded"):
        decode_image(b"oops")
    whole = encode_image(noise(3, "uint8"))
    with pytest.raises(InputError, match="cannot be decoded"):
        decode_image(whole[: len(whole) // 2])
