"""Read one tile of a dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

from shards.codec import decode_image, decode_label
from shards.errors import InputError
from shards.index import Index, tile_name
from shards.manifest import Dataset


@dataclass(frozen=True)
class Tile:
    """A decoded tile."""

    image: npt.NDArray[Any]  # [C,S,S] in the dataset's dtype
    valid: npt.NDArray[np.bool_]  # [S,S]
    label: npt.NDArray[np.uint8] | None  # [S,S], class ids and 255
    meta: dict[str, Any]


def read_tile(dataset: Dataset, index: Index, row: int) -> Tile:
    """Read, check and decode the tile of an index row.

    Raises:
        InputError: when its bytes are not those that were packed; names shard, offset and key.
    """
    with dataset.open_shard(int(index.shard[row])) as file:
        codec = dataset.manifest.codec
        mask = _member(dataset, index, row, "mask", file) if int(index.mask_size[row]) else None
        image, valid = decode_image(_member(dataset, index, row, "image", file), codec["image"], mask)
        labelled = int(index.label_size[row]) > 0
        label = decode_label(_member(dataset, index, row, "label", file), codec["label"]) if labelled else None
        meta = _meta(dataset, index, row, file)
    return Tile(image, np.ones(image.shape[1:], dtype=bool) if valid is None else valid, label, meta)


def read_meta(dataset: Dataset, index: Index, row: int) -> dict[str, Any]:
    """What a tile says of its place: ``scene``, ``window``, ``crs`` (WKT or None) and ``transform`` (six numbers).

    Reads neither pixels nor label. Raises :class:`InputError` where it is damaged.
    """
    with dataset.open_shard(int(index.shard[row])) as file:
        return _meta(dataset, index, row, file)


def _meta(dataset: Dataset, index: Index, row: int, file: FileIO) -> dict[str, Any]:
    file.seek(int(index.meta_offset[row]))
    try:
        meta: dict[str, Any] = json.loads(file.read(int(index.meta_size[row])))
    except ValueError:
        shard = dataset.shard_name(int(index.shard[row]))
        raise InputError(
            f"{shard}: meta of tile {tile_name(dataset, index, row)} is damaged; `dctc verify` says more"
        ) from None
    return meta


def _member(dataset: Dataset, index: Index, row: int, what: str, file: FileIO) -> bytes:
    offset = int(getattr(index, f"{what}_offset")[row])
    file.seek(offset)
    data = file.read(int(getattr(index, f"{what}_size")[row]))
    if zlib_ng.crc32(data) != int(getattr(index, f"{what}_crc32")[row]):
        raise InputError(
            f"{dataset.shard_name(int(index.shard[row]))}: {what} of tile {tile_name(dataset, index, row)} "
            f"at byte {offset} is damaged "
            "(crc32 differs); run `dctc verify` and pack the dataset again"
        )
    return data
