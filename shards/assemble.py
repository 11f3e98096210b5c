"""Copy staged members into one shard."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

from shards.bandstats import Statistics
from shards.codec import decode_image
from shards.errors import InputError
from shards.files import atomic_file, file_sha256, write_atomic
from shards.stage import Blob, StagedTile, read_blob
from shards.tar import SUFFIXES, TarWriter


class Placed(BaseModel):
    """Where a tile's members lie in their shard: byte offsets and sizes; a label of size 0 is absent."""

    model_config = ConfigDict(frozen=True)

    row: int
    image_offset: int
    image_size: int
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
    dtype: str
    bands: int
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


def assemble_shard(task: AssembleTask) -> str:
    """Write one shard and its sidecar; its name.

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
    return task.name


def _copy(task: AssembleTask, writer: TarWriter, statistics: Statistics | None) -> Iterator[Placed]:
    for row, scene, tile in task.tiles:
        with (task.staging / f"{scene}.tiles").open("rb") as staged:
            offsets = []
            for suffix, blob in zip(SUFFIXES, (tile.image, tile.label, tile.meta), strict=True):
                data = _checked(task, staged, tile.key, blob) if blob else b""
                offsets.append(writer.add(f"{tile.key}.{suffix}", data) if blob else 0)
                if statistics is not None and blob is tile.image:
                    array, valid = decode_image(data)
                    statistics.add(array.reshape(len(array), -1) if valid is None else array[:, valid])
            yield Placed(
                row=row,
                image_offset=offsets[0],
                image_size=tile.image.size,
                label_offset=offsets[1],
                label_size=tile.label.size if tile.label else 0,
                meta_offset=offsets[2],
                meta_size=tile.meta.size,
            )


def _checked(task: AssembleTask, file: IO[bytes], key: str, blob: Blob) -> bytes:
    data = read_blob(file, blob)
    if zlib.crc32(data) != blob.crc32:
        raise InputError(f"{task.staging}: staged tile {key} is damaged; run `dctc shard` with --fresh to begin again")
    return data
