from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from shards.codec import (
    DTYPES,
    LOSSY,
    SUFFIXES,
    check_codec,
    decode_image,
    decode_label,
    encode_image,
    encode_label,
    encode_mask,
    holds_mask,
    read_image,
    read_label,
)
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


HELD = {  # codec -> (dtype, bands) that it holds
    "geotiff": [(dtype, bands) for dtype in DTYPES for bands in (1, 2, 3, 4, 5, 9)],
    "npy": [(dtype, bands) for dtype in DTYPES for bands in (1, 2, 3, 4, 5, 9)],
    "png": [(dtype, bands) for dtype in ("uint8", "uint16") for bands in (1, 2, 3, 4)],
    "jpeg": [("uint8", 1), ("uint8", 3)],
}
CASES = [(codec, dtype, bands) for codec, held in HELD.items() for dtype, bands in held]


def drawn(seed: int, dtype: str, bands: int, size: int, kind: str) -> npt.NDArray[Any]:
    """Pixels of an awkward kind; float32 includes what is not a number."""
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 256, (bands, size, size * np.dtype(dtype).itemsize), dtype=np.uint8)
    array = words.view(dtype)
    if kind == "flat":
        array[...] = array[0, 0, 0]
    elif kind == "sparse":  # the last band, which might be taken for alpha, is mostly 0
        array[-1][generator.random((size, size)) > 0.1] = 0
    return array


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from([case for case in CASES if case[0] not in LOSSY]),
    seed=st.integers(0, 2**32),
    size=st.integers(8, 40),
    kind=st.sampled_from(["noise", "flat", "sparse"]),
    valid_share=st.sampled_from([0.02, 0.5, 1.0]),
)
def test_every_lossless_codec_gives_back_every_bit(
    case: tuple[str, str, int], seed: int, size: int, kind: str, valid_share: float
) -> None:
    codec, dtype, bands = case
    array = drawn(seed, dtype, bands, size, kind)
    valid = np.random.default_rng(seed).random((size, size)) < valid_share
    data = encode_image(array, valid, LOCAL, PLACE, codec=codec)
    mask = None if holds_mask(codec) or valid.all() else encode_mask(valid)
    image, back = np.full_like(array, 7), np.zeros((size, size), bool)
    read_image(codec, data, mask, image, back)
    assert image.tobytes() == array.tobytes()
    assert np.array_equal(back, valid)
    assert set(np.unique(back.view(np.uint8))) <= {0, 1}
    again, also = decode_image(data, codec, mask)
    assert again.tobytes() == array.tobytes()
    assert again.dtype == array.dtype
    assert (also is None) == valid.all()


@settings(max_examples=60, deadline=None)
@given(codec=st.sampled_from(["geotiff", "npy", "png"]), seed=st.integers(0, 2**32), size=st.integers(8, 40))
def test_every_label_codec_gives_back_every_bit(codec: str, seed: int, size: int) -> None:
    ids = drawn(seed, "uint8", 1, size, "noise")[0]
    data = encode_label(ids, LOCAL, PLACE, codec=codec)
    label = np.zeros_like(ids)
    read_label(codec, data, label)
    assert np.array_equal(label, ids)
    assert np.array_equal(decode_label(data, codec), ids)


@pytest.mark.parametrize("bands", [1, 3])
def test_jpeg_is_near_and_keeps_nodata_at_zero(bands: int) -> None:
    array = random_image(bands, 64, 64, 0)
    valid = np.ones((64, 64), dtype=bool)
    valid[:20, :30] = False
    array[:, ~valid] = 0
    best, rough = (encode_image(array, codec="jpeg", quality=quality) for quality in (95, 30))
    assert len(rough) < len(best) / 2
    image, back = decode_image(best, "jpeg", encode_mask(valid))
    assert back is not None
    assert np.array_equal(back, valid)
    assert not image[:, ~valid].any()
    difference = np.abs(image.astype(int) - array)[:, valid]
    assert 0 < difference.mean() < 4


@pytest.mark.parametrize(
    ("codec", "suffix", "magic"),
    [
        ("geotiff", "tif", b"II*\0"),
        ("npy", "npy", b"\x93NUMPY\x01\0"),
        ("jpeg", "jpg", b"\xff\xd8\xff"),
        ("png", "png", b"\x89PNG"),
    ],
)
def test_files_are_what_their_names_say(codec: str, suffix: str, magic: bytes) -> None:
    assert encode_image(noise(3, "uint8"), codec=codec).startswith(magic)
    assert SUFFIXES[codec] == suffix


def test_an_npy_is_numpys_own(tmp_path: Path) -> None:
    for array in (noise(2, "uint8"), noise(3, "float32"), noise(1, "int16")):
        (tmp_path / "x.npy").write_bytes(encode_image(array, codec="npy"))
        assert np.array_equal(np.load(tmp_path / "x.npy"), array)
        np.save(tmp_path / "y.npy", array)
        assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()


def test_what_a_codec_cannot_hold_is_refused() -> None:
    for codec in HELD:
        for dtype in DTYPES:
            for bands in (1, 2, 3, 4, 5, 9):
                if (dtype, bands) in HELD[codec]:
                    check_codec(codec, dtype, bands)
                else:
                    with pytest.raises(
                        InputError, match=f"codec.image {codec} holds .* set codec.image to one of geotiff"
                    ):
                        check_codec(codec, dtype, bands)
                    with pytest.raises(InputError, match=f"these images are {dtype} with {bands}"):
                        encode_image(noise(bands, dtype), codec=codec)


@pytest.mark.parametrize("codec", HELD)
def test_a_tile_of_another_shape_or_dtype_is_refused(codec: str) -> None:
    array = noise(3, "uint8")
    data = encode_image(array, codec=codec)
    valid = np.zeros((48, 48), bool)
    for wrong in (np.zeros((1, 48, 48), np.uint8), np.zeros((3, 48, 49), np.uint8), np.zeros((3, 48, 48), np.int16)):
        with pytest.raises(InputError, match="a tile"):
            read_image(codec, data, None, wrong, np.zeros(wrong.shape[1:], bool))
    for cut in (data[:4], data[: len(data) // 2], b""):
        with pytest.raises(InputError, match=r"a tile of .* bytes cannot be decoded"):
            read_image(codec, cut, None, np.empty_like(array), valid)
        with pytest.raises(InputError, match=r"a tile of .* bytes cannot be decoded"):
            decode_image(cut, codec)
    if codec not in LOSSY:
        with pytest.raises(InputError, match="a tile"):
            read_label(codec, encode_label(array[0], codec=codec), np.empty((47, 48), np.uint8))
    if not holds_mask(codec):
        with pytest.raises(InputError, match="a tile"):
            read_image(codec, data, encode_mask(np.ones((8, 8), bool)), np.empty_like(array), valid)
