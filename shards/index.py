"""Random access: one memory-mapped column a file, one row a tile, rows in ascending order of the tiles' keys."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

from shards.errors import AccessError, InputError
from shards.files import file_sha256, write_atomic
from shards.manifest import SPLITS, Dataset
from shards.report import read_plan
from shards.splits import UNRANKED, key_hashes, ranks, share_length
from shards.tar import BLOCK, members, parse_header

COLUMNS: dict[str, str] = {
    "shard": "<u4",
    "image_offset": "<u8",
    "image_size": "<u4",
    "label_offset": "<u8",
    "label_size": "<u4",
    "meta_offset": "<u8",
    "meta_size": "<u4",
    "mask_offset": "<u8",
    "mask_size": "<u4",
    "image_crc32": "<u4",
    "label_crc32": "<u4",
    "mask_crc32": "<u4",
    "scene": "<u4",
    "split": "|u1",
    "classes": "<u8",
    "valid_share": "<f4",
    "key_hash": "<u8",
    "labelled_rank": "<u4",
}

Column = npt.NDArray[Any]


@dataclass(frozen=True)
class Index:
    """The columns of a dataset's index; [N] each, read only."""

    shard: Column  # position in Manifest.shards
    image_offset: Column  # byte offsets and sizes of the members' data inside the shard
    image_size: Column
    label_offset: Column
    label_size: Column  # 0 = the tile has no label
    meta_offset: Column
    meta_size: Column
    mask_offset: Column
    mask_size: Column  # 0 = the tile has no mask member: it is wholly valid, or its image member holds the mask
    image_crc32: Column
    label_crc32: Column
    mask_crc32: Column
    scene: Column  # position in Manifest.scenes
    split: Column  # position in manifest.SPLITS
    classes: Column  # bit k set: class k has a pixel
    valid_share: Column
    key_hash: Column  # first 8 bytes of sha256(key), little endian
    by: str  # how labelled shares are drawn: "tile" or "scene"
    labelled_rank: Column  # place in the nested order of labelled training tiles, 0xFFFFFFFF elsewhere

    @classmethod
    def open(cls, dataset: Dataset, *, hashed: bool = True) -> Index:
        """Map the columns of a dataset.

        ``hashed=False`` leaves out their sha256: for whoever works with rows of an index that has been opened with it.

        Raises:
            InputError: when a column is missing, of another type, not as the manifest has it, or of another length.
        """
        columns = {name: _open_column(dataset, name, hashed) for name in COLUMNS}
        tiles = sum(shard.tiles for shard in dataset.manifest.shards)
        for name, column in columns.items():
            if column.shape != (tiles,):
                raise InputError(
                    f"{_path(dataset.root, name)}: {len(column)} rows for {tiles} tiles; pack the dataset again"
                )
        return cls(**columns, by=dataset.manifest.labelled.by)

    def __len__(self) -> int:
        return len(self.shard)

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Rows of a split, ascending.

        Raises:
            InputError: when there is no split of that name.
        """
        if split not in SPLITS:
            raise InputError(f"split {split!r} is not known; it can be {', '.join(SPLITS)}")
        return np.flatnonzero(self.split == SPLITS.index(split))

    def labelled_rows(self, share: Fraction) -> npt.NDArray[np.int64]:
        """Training rows of a labelled share in the nested order: a smaller share's rows are a prefix of a larger's."""
        total = int((self.labelled_rank != UNRANKED).sum())
        order = np.argsort(self.labelled_rank, kind="stable")[:total]
        return order[: share_length(share, self.by, self.scene[order])].astype(np.int64)

    def unlabelled_rows(self, share: Fraction) -> npt.NDArray[np.int64]:
        """All other training rows, ascending; when there are none (share 1), the labelled ones."""
        labelled = self.labelled_rows(share)
        others = np.setdiff1d(self.rows("train"), labelled)
        return others if len(others) else np.sort(labelled)


def _path(root: Path, name: str) -> Path:
    return root / "index" / f"{name}.npy"


def _open_column(dataset: Dataset, name: str, hashed: bool) -> Column:
    path = _path(dataset.root, name)
    try:
        column: Column = np.load(path, mmap_mode="r", allow_pickle=False)
        sound = column.dtype == np.dtype(COLUMNS[name])
        sound &= not hashed or file_sha256(path) == dataset.manifest.index.get(name)
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; {_remedy(dataset)}") from None
    except OSError as error:
        raise AccessError(f"{path}: cannot be opened ({error.strerror or error})") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_remedy(dataset)}") from None
    if not sound:
        raise InputError(f"{path}: is not the column that the manifest names (damaged?); {_remedy(dataset)}")
    return column.view(np.ndarray)  # mapped all the same; one element of a np.memmap takes microseconds


def _remedy(dataset: Dataset) -> str:
    if dataset.store is not None:
        return "run again, and it is fetched again"
    return f"`dctc verify {dataset.root} --rebuild-index` writes it again from the shards"


def write_index(out: Path, columns: Mapping[str, Column]) -> dict[str, str]:
    """Write each column; their sha256 by name."""
    digests = {}
    for name, column in columns.items():
        data = _column_bytes(column)
        write_atomic(_path(out, name), data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def column_sha256(column: Column) -> str:
    """sha256 of the file that :func:`write_index` makes of a column."""
    return hashlib.sha256(_column_bytes(column)).hexdigest()


def _column_bytes(column: Column) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, column, allow_pickle=False)
    return buffer.getvalue()


def empty_columns(rows: int) -> dict[str, Column]:
    """Columns of zeros."""
    return {name: np.zeros(rows, dtype=dtype) for name, dtype in COLUMNS.items()}


def rebuild(dataset: Dataset) -> dict[str, Column]:
    """The index columns read back from the shards alone: tar headers, metadata and the members' bytes.

    Raises:
        InputError: when a shard is missing or damaged.
    """
    tiles: dict[str, dict[str, Any]] = {}
    scene_of = {scene: number for number, scene in enumerate(dataset.manifest.scenes)}
    for number, shard in enumerate(dataset.manifest.shards):
        path = dataset.root / shard.name
        try:
            found = _tiles_of(path, scene_of)
        except FileNotFoundError:
            raise InputError(f"{path}: is missing; pack the dataset again") from None
        except (ValueError, KeyError, TypeError):  # of members, metadata or scenes that are not this dataset's
            raise InputError(
                f"{path}: is damaged or no shard of this dataset; `dctc verify` says more, pack the dataset again"
            ) from None
        tiles |= {key: tile | {"shard": number, "split": SPLITS.index(shard.split)} for key, tile in found.items()}
    return _columns(dataset, tiles)


def _tiles_of(path: Path, scene_of: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """By key what the index says of each tile of a shard; ValueError, KeyError or TypeError for other content."""
    tiles: dict[str, dict[str, Any]] = {}
    for member in members(path):
        key, _, suffix = member.name.partition(".")
        what = suffix.partition(".")[0]
        if what not in ("image", "mask", "label", "meta"):
            raise ValueError(member.name)
        tiles.setdefault(key, {}).update({f"{what}_offset": member.offset, f"{what}_size": member.size})
    with path.open("rb") as file:

        def read(tile: Mapping[str, Any], what: str) -> bytes:
            file.seek(tile[f"{what}_offset"])
            return file.read(tile[f"{what}_size"])

        for tile in tiles.values():
            meta = json.loads(read(tile, "meta"))
            tile["scene"] = scene_of[meta["scene"]]
            tile["valid_share"] = float(meta["valid_share"])
            tile["classes"] = sum(1 << k for k in meta["classes"])
            tile["image_crc32"] = zlib_ng.crc32(read(tile, "image"))
            for what in ("label", "mask"):
                if f"{what}_size" in tile:
                    tile[f"{what}_crc32"] = zlib_ng.crc32(read(tile, what))
    return tiles


def _columns(dataset: Dataset, tiles: Mapping[str, Mapping[str, Any]]) -> dict[str, Column]:
    keys = sorted(tiles)
    columns = empty_columns(len(keys))
    for row, key in enumerate(keys):
        for name, value in tiles[key].items():
            columns[name][row] = value
    columns["key_hash"][:] = key_hashes(keys)
    labelled = dataset.manifest.labelled
    row_of = {key: row for row, key in enumerate(keys)}
    first = [row_of[key] for key in read_plan(dataset)["labelled_first"] if key in row_of]
    columns["labelled_rank"][:] = ranks(
        labelled.seed, labelled.by, columns["classes"].tolist(), columns["split"], columns["scene"], first
    )
    return columns


def tile_name(dataset: Dataset, index: Index, row: int) -> str:
    """The key of a tile, from the header of its image member.

    Raises:
        InputError: when the header is damaged.
    """
    shard = int(index.shard[row])
    place = int(index.image_offset[row]) - BLOCK
    with dataset.open_shard(shard) as file:
        file.seek(place)
        return parse_header(file.read(BLOCK), place, dataset.shard_name(shard)).name.partition(".")[0]
