"""Copy staged members into one shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from zlib_ng import zlib_ng

from shards.bandstats import Statistics
from shards.codec import MASK_MEMBER, member_name, read_image
from shards.errors import InputError
from shards.files import atomic_file, file_sha256, write_atomic
from shards.progress import Work
from shards.sections import Codec
from shards.stage import Blob, StagedTile, read_blob
from shards.tar import TarWriter


class Placed(BaseModel):
    """Where a tile's members lie in their shard: byte offsets and sizes; a member of size 0 is absent."""

    model_config = ConfigDict(frozen=True)

    row: int
    image_offset: int
    image_size: int
    mask_offset: int = 0
    mask_size: int = 0
    label_offset: int = 0
    label_size: int = 0
    meta_offset: int
    meta_size: int


class ShardRecord(BaseModel):
    """The sidecar of a finished shard."""

    model_config = ConfigDict(frozen=True)

    plan_sha256: str
    bytes: int
    sha256: str
    placed: list[Placed]


@dataclass(frozen=True)
class AssembleTask:
    """All that a worker needs to write one shard: ``tiles`` are (row, scene, staged tile) in the order of writing."""

    out: Path
    staging: Path
    name: str
    plan_sha256: str
    codec: Codec
    dtype: str
    bands: int
    tile_size: int
    statistics: bool  # gather band statistics: training shards only
    tiles: list[tuple[int, str, StagedTile]]

    @property
    def path(self) -> Path:
        """The shard."""
        return self.out / self.name

    @property
    def sidecar(self) -> Path:
        """The shard's record."""
        return self.staging / f"{Path(self.name).stem}.shard.json"

    @property
    def statistics_file(self) -> Path:
        """Statistics of the shard's images."""
        return self.staging / f"{Path(self.name).stem}.npz"


def read_record(task: AssembleTask) -> ShardRecord | None:
    """The record of a shard that this plan has finished, or None."""
    try:
        record = ShardRecord.model_validate_json(task.sidecar.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return record if record.plan_sha256 == task.plan_sha256 else None


def is_assembled(task: AssembleTask, verify: bool) -> bool:
    """Whether the shard is finished; ``verify`` re-hashes it."""
    record = read_record(task)
    if record is None or not task.path.is_file() or task.path.stat().st_size != record.bytes:
        return False
    if task.statistics and not task.statistics_file.is_file():
        return False
    return not verify or file_sha256(task.path) == record.sha256


def assemble_shard(task: AssembleTask) -> Work:
    """Write one shard and its sidecar.

    Raises:
        InputError: when a staged member is damaged.
    """
    task.sidecar.unlink(missing_ok=True)
    statistics = Statistics(task.dtype, task.bands) if task.statistics else None
    with atomic_file(task.path) as target:
        writer = TarWriter(target)
        placed = list(_copy(task, writer, statistics))
        digest = writer.finish()
    if statistics is not None:
        statistics.save(task.statistics_file)
    record = ShardRecord(plan_sha256=task.plan_sha256, bytes=writer.bytes, sha256=digest, placed=placed)
    write_atomic(task.sidecar, record.model_dump_json().encode())
    return Work(len(task.tiles), writer.bytes)


def _copy(task: AssembleTask, writer: TarWriter, statistics: Statistics | None) -> Iterator[Placed]:
    names = {
        "image": member_name("image", task.codec.image),
        "mask": MASK_MEMBER,
        "label": member_name("label", task.codec.label),
        "meta": "meta.json",
    }
    pixels = np.empty((task.bands, task.tile_size, task.tile_size), task.dtype)
    valid = np.empty(pixels.shape[1:], dtype=np.bool_)
    for row, scene, tile in task.tiles:
        places, data = {}, {}
        with (task.staging / f"{scene}.tiles").open("rb") as staged:
            for name, blob in tile.members:
                data[name] = _checked(task, staged, tile.key, blob)
                places[f"{name}_offset"] = writer.add(f"{tile.key}.{names[name]}", data[name])
                places[f"{name}_size"] = blob.size
            if statistics is not None and tile.histogram is not None:
                data["histogram"] = _checked(task, staged, tile.key, tile.histogram)
        if statistics is not None and "histogram" in data:
            statistics.add_counts(np.frombuffer(data["histogram"], np.int32).reshape(task.bands, -1))
        elif statistics is not None:
            read_image(task.codec.image, data["image"], data.get("mask"), pixels, valid)
            statistics.add(pixels.reshape(len(pixels), -1) if valid.all() else pixels[:, valid])
        yield Placed(row=row, **places)


def _checked(task: AssembleTask, file: IO[bytes], key: str, blob: Blob) -> bytes:
    data = read_blob(file, blob)
    if zlib_ng.crc32(data) != blob.crc32:
        raise InputError(f"{task.staging}: staged tile {key} is damaged; run `dctc shard` with --fresh to begin again")
    return data
