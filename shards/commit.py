"""Index and manifest: what makes written shards a dataset."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from shards.assemble import AssembleTask, ShardRecord, read_record
from shards.bandstats import Statistics
from shards.codec import LOSSY
from shards.errors import InputError
from shards.files import write_atomic
from shards.index import COLUMNS, Column, empty_columns, write_index
from shards.manifest import (
    IGNORE,
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    Band,
    ClassInfo,
    Manifest,
    Shard,
    dump_manifest,
)
from shards.plan import Plan, has_classes, labelled_subsets, split_infos
from shards.sections import Codec

_NAMES = "|".join([*(rf"{split}-\d{{6}}\.tar" for split in SPLITS), *(rf"{name}\.npy" for name in COLUMNS)])
_OURS = re.compile(_NAMES)


def commit(plan: Plan, tasks: Sequence[AssembleTask], out: Path) -> None:
    """Make ``out`` a dataset whose shards are all written."""
    records = [_record(task) for task in tasks]
    remove_stale(out, keep=[task.path for task in tasks])
    index = write_index(out, build_columns(plan, records))
    manifest = _manifest(plan, tasks, records, index)
    write_atomic(out / MANIFEST, dump_manifest(manifest))


def remove_stale(out: Path, keep: Collection[Path]) -> None:
    """Delete shards and columns that an earlier run has left, but for those to ``keep``; no file of any other name."""
    ours = [*(out / "shards").iterdir(), *(out / "index").iterdir()]
    for file in ours:
        if file not in keep and _OURS.fullmatch(file.name):
            file.unlink()


def _record(task: AssembleTask) -> ShardRecord:
    record = read_record(task)
    if record is None:
        raise InputError(f"{task.sidecar}: vanished while packing; run `dctc shard` again")
    return record


def _manifest(
    plan: Plan, tasks: Sequence[AssembleTask], records: Sequence[ShardRecord], index: dict[str, str]
) -> Manifest:
    recipe = plan.recipe
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tool_version=importlib.metadata.version("dctc"),
        name=recipe.name,
        protocol=recipe.splits.protocol,
        tile_size=recipe.tile.size,
        stride=recipe.tile.step,
        codec=_codec(recipe.codec),
        dtype=plan.dtype,
        bands=_bands(plan, tasks),
        classes=[ClassInfo(name=c.name, color=c.color) for c in recipe.classes],
        ignore_index=IGNORE,
        scenes=[scene.scene for scene in plan.scenes],
        splits=split_infos(plan),
        labelled=labelled_subsets(plan),
        shards=[
            Shard(
                name=shard.name,
                split=shard.split,
                tiles=len(shard.tiles),
                labelled=sum(has_classes(plan.tiles[i]) for i in shard.tiles),
                bytes=record.bytes,
                sha256=record.sha256,
            )
            for shard, record in zip(plan.shards, records, strict=True)
        ],
        index=index,
        plan_sha256=records[0].plan_sha256,
    )


def _codec(codec: Codec) -> dict[str, str]:
    found = {"image": codec.image, "label": codec.label, "lossy": "no"}
    return found | {"lossy": "yes", "quality": str(codec.quality)} if codec.image in LOSSY else found


def _bands(plan: Plan, tasks: Sequence[AssembleTask]) -> list[Band]:
    names = plan.recipe.bands.names
    total = Statistics(plan.dtype, len(names))
    for task in tasks:
        if task.statistics:
            total.merge(Statistics.load(task.statistics_file, plan.dtype, len(names)))
    return [Band(name=name, **vars(total.summary(band))) for band, name in enumerate(names)]


def build_columns(plan: Plan, records: Sequence[ShardRecord]) -> dict[str, Column]:
    """The columns of a planned dataset whose shards are written."""
    columns = empty_columns(len(plan.tiles))
    for number, record in enumerate(records):
        for placed in record.placed:
            columns["shard"][placed.row] = number
            for name in ("image", "mask", "label", "meta"):
                for what in ("offset", "size"):
                    columns[f"{name}_{what}"][placed.row] = getattr(placed, f"{name}_{what}")
    columns["image_crc32"][:] = [tile.image.crc32 for tile in plan.tiles]
    columns["label_crc32"][:] = [tile.label.crc32 if tile.label else 0 for tile in plan.tiles]
    columns["mask_crc32"][:] = [tile.mask.crc32 if tile.mask else 0 for tile in plan.tiles]
    columns["classes"][:] = [tile.classes for tile in plan.tiles]
    columns["valid_share"][:] = [tile.valid_share for tile in plan.tiles]
    columns["scene"][:] = plan.scene_of
    columns["split"][:] = plan.split_of
    columns["labelled_rank"][:] = plan.rank_of
    columns["key_hash"][:] = plan.key_hash
    return columns
