"""Which tile goes where: splits, shards and labelled ranks, from the staged scenes alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.labels import REASONS
from shards.manifest import SPLITS, Labelled, Split, SplitInfo, missing_classes, parse_share, share_count
from shards.reading import LabelCount
from shards.recipe import Recipe
from shards.scenes import Dtype
from shards.splits import TRAIN, UNRANKED, draw, idle_patterns, key_hashes, ranks, scene_splits
from shards.stage import Blob, StagedScene, StagedTile
from shards.tar import member_bytes

PLAN_SCHEMA = 1
RULE = (
    "the tiles of a split are sorted by key_hash (first 8 bytes of sha256(key), little endian) and cut into shards of "
    "equal counts, the first ones one tile larger"
)


@dataclass(frozen=True)
class PlannedShard:
    """A shard and its tiles: positions in :attr:`Plan.tiles` in the order in which they are written."""

    name: str
    split: Split
    tiles: list[int]


@dataclass(frozen=True)
class Plan:
    """Everything about the dataset but the places of the members inside the tar files."""

    recipe: Recipe
    dtype: Dtype
    scenes: list[StagedScene]  # ascending by id, which is also the index column `scene`
    tiles: list[StagedTile]  # kept tiles, ascending by key
    scene_of: npt.NDArray[np.uint32]
    split_of: npt.NDArray[np.uint8]
    rank_of: npt.NDArray[np.uint32]
    key_hash: npt.NDArray[np.uint64]
    shards: list[PlannedShard]
    dropped: int  # tiles below min_valid_share; windows without any valid pixel not counted


def has_classes(tile: StagedTile) -> bool:
    """Whether a tile is labelled: its label has at least one pixel of a class."""
    return tile.classes > 0


def make_plan(recipe: Recipe, dtype: Dtype, scenes: Sequence[StagedScene]) -> Plan:
    """Plan a dataset from its staged scenes, given in ascending order of ids.

    Raises:
        InputError: when no tile is left to train on or the splits do not fit the scenes.
    """
    staged = [(tile, number) for number, scene in enumerate(scenes) for tile in scene.tiles]
    kept = [(tile, number) for tile, number in staged if tile.valid_share >= recipe.tile.min_valid_share]
    kept.sort(key=lambda pair: pair[0].key)
    tiles = [tile for tile, _ in kept]
    scene_of = np.array([number for _, number in kept], dtype=np.uint32)
    split_of = _split(recipe, scenes, tiles, scene_of)
    if not (split_of == TRAIN).any():
        raise InputError(
            f"recipe {recipe.name}: no tile is left to train on ({len(staged)} tiles, {len(staged) - len(kept)} below "
            f"tile.min_valid_share {recipe.tile.min_valid_share}); correct splits or tile"
        )
    hashes = key_hashes([tile.key for tile in tiles])
    return Plan(
        recipe=recipe,
        dtype=dtype,
        scenes=list(scenes),
        tiles=tiles,
        scene_of=scene_of,
        split_of=split_of,
        rank_of=ranks(recipe.labelled.seed, [tile.classes for tile in tiles], split_of),
        key_hash=hashes,
        shards=_shards(recipe, tiles, split_of, hashes),
        dropped=len(staged) - len(kept),
    )


def _split(
    recipe: Recipe, scenes: Sequence[StagedScene], tiles: Sequence[StagedTile], scene_of: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint8]:
    if recipe.splits.protocol == "scene":
        codes = scene_splits(recipe.splits, [(scene.scene, scene.labelled) for scene in scenes if not scene.extra])
        return np.array([codes.get(scene.scene, TRAIN) for scene in scenes], dtype=np.uint8)[scene_of]
    split_of = np.full(len(tiles), TRAIN, dtype=np.uint8)
    labelled = np.array([has_classes(tile) for tile in tiles], dtype=bool)
    if labelled.any():
        split_of[labelled] = draw(recipe.splits.paper, recipe.splits.seed, int(labelled.sum()), "tiles")
    return split_of


def _shards(
    recipe: Recipe, tiles: Sequence[StagedTile], split_of: npt.NDArray[np.uint8], hashes: npt.NDArray[np.uint64]
) -> list[PlannedShard]:
    shards = []
    for code, split in enumerate(SPLITS):
        rows = np.flatnonzero(split_of == code)
        if not len(rows):
            continue
        total = sum(member_bytes(blob.size) for i in rows.tolist() for blob in _blobs(tiles[i]))
        count = min(max(1, round(total / (recipe.shards.megabytes * 2**20))), len(rows))
        placed = rows[np.argsort(hashes[rows], kind="stable")]
        for number, part in enumerate(np.array_split(placed, count)):
            shards.append(PlannedShard(f"shards/{split}-{number:06d}.tar", split, part.tolist()))
    return shards


def _blobs(tile: StagedTile) -> list[Blob]:
    return [blob for _, blob in tile.members]


def split_infos(plan: Plan) -> dict[str, SplitInfo]:
    """Counts of each split, also of those without tiles."""
    infos: dict[str, SplitInfo] = {}
    for code, name in enumerate(SPLITS):
        rows = np.flatnonzero(plan.split_of == code)
        tiles = [plan.tiles[i] for i in rows.tolist()]
        infos[name] = SplitInfo(
            tiles=len(tiles),
            labelled=sum(map(has_classes, tiles)),
            scenes=len(np.unique(plan.scene_of[rows])),
            pixels=[sum(tile.pixels[k] for tile in tiles) for k in range(len(plan.recipe.classes))],
            ignored={reason: sum(tile.ignored[reason] for tile in tiles) for reason in REASONS},
        )
    return infos


def labelled_subsets(plan: Plan) -> Labelled:
    """The nested labelled subsets and the classes that each has no pixel of."""
    rows = np.argsort(plan.rank_of, kind="stable")[: int((plan.rank_of != UNRANKED).sum())]
    seen = np.bitwise_or.accumulate(np.array([plan.tiles[i].classes for i in rows.tolist()], dtype=np.uint64))
    shares = {text: share_count(parse_share(text), len(rows)) for text in plan.recipe.labelled.shares if len(rows)}
    names = [c.name for c in plan.recipe.classes]
    missing = {text: missing_classes(int(seen[count - 1]), names) for text, count in shares.items()}
    return Labelled(seed=plan.recipe.labelled.seed, total=len(rows), shares=shares, missing=missing)


def dump_plan(plan: Plan) -> bytes:
    """The canonical bytes of plan.json: what went in, the rules, and a digest of which tile goes where."""
    names = [shard.name for shard in plan.shards]
    shard_of = {i: number for number, shard in enumerate(plan.shards) for i in shard.tiles}
    lines = (
        " ".join([tile.key, names[shard_of[i]], *(str(blob.crc32) for blob in _blobs(tile))])
        for i, tile in enumerate(plan.tiles)
    )
    record = {
        "schema_version": PLAN_SCHEMA,
        "recipe": plan.recipe.model_dump(mode="json"),
        "recipe_sha256": plan.recipe.digest,
        "rule": RULE,
        "tiles_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "dropped": plan.dropped,
        "idle_patterns": idle_patterns(plan.recipe.splits, [scene.scene for scene in plan.scenes if not scene.extra]),
        "shards": [{"name": s.name, "split": s.split, "tiles": len(s.tiles)} for s in plan.shards],
        "scenes": _scene_records(plan),
    }
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _scene_records(plan: Plan) -> list[dict[str, Any]]:
    per_scene = Counter(zip(plan.scene_of.tolist(), plan.split_of.tolist(), strict=True))
    return [
        {
            "id": scene.scene,
            "labelled": scene.labelled,
            "extra": scene.extra,
            "inputs": [source.model_dump(exclude={"mtime_ns"}) for source in scene.sources],
            "height": scene.height,
            "width": scene.width,
            "tiles": {name: per_scene[number, code] for code, name in enumerate(SPLITS)},
            "empty": scene.empty,
            "label": _label_record(scene.label),
        }
        for number, scene in enumerate(plan.scenes)
    ]


def _label_record(label: LabelCount | None) -> dict[str, Any] | None:
    if label is None:
        return None
    return {
        "counted": label.counted,
        "total": label.total,
        "unmatched": label.unmatched,
        "unknown": [{"value": value, "count": count} for value, count in label.values],
    }
