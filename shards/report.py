"""What packing has to say, read from the finished dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from shards.errors import InputError
from shards.manifest import Dataset
from shards.overlaps import overlapping

PLAN = "plan.json"

_NAMED = 5  # split patterns without a scene that are listed


@dataclass(frozen=True)
class UnmatchedScene:
    """A scene some of whose label the recipe does not know: colours, numbers or attributes; that became ignore."""

    scene: str
    counted: str  # "pixels", or "features" of a vector file
    count: int
    share: float  # of the label's pixels or features
    values: list[tuple[str, int]]  # the most frequent ones with their counts


@dataclass(frozen=True)
class PackReport:
    """The summary of a packed dataset; ``lines`` is what a person needs to read."""

    scenes: int
    unlabelled_scenes: int
    tiles: int
    shards: int
    bytes: int
    empty: int  # windows without a valid pixel
    dropped: int  # tiles below tile.min_valid_share
    left_out: int  # tiles too near to another split's, or in no list
    overlaps: list[tuple[str, str]]  # scenes of different splits that show the same ground
    unmatched: list[UnmatchedScene]
    idle_patterns: list[str]  # split patterns that name no scene
    missing: dict[str, list[str]]  # labelled share -> classes that it lacks
    absent: list[str]  # classes that no training tile has a pixel of

    def lines(self) -> list[str]:
        """The report in plain sentences, the notable after the ordinary."""
        text = [
            (
                f"{self.tiles} tiles of {self.scenes} scenes ({self.unlabelled_scenes} without label) in {self.shards} "
                f"shards, {self.bytes / 2**20:.1f} MiB"
            )
        ]
        if self.empty or self.dropped:
            text.append(f"left out: {self.empty} windows without data, {self.dropped} tiles below tile.min_valid_share")
        for scene in self.unmatched:
            values = ", ".join(f"{value} ({count})" for value, count in scene.values)
            text.append(
                f"scene {scene.scene}: {scene.count} label {scene.counted} ({scene.share:.3%}) with values that the "
                f"recipe does not know became ignore: {values}"
            )
        if self.left_out:
            text.append(f"{self.left_out} tiles are in no split: too near to one of another split, or in no list")
        if self.overlaps:
            pairs = ", ".join(f"{one} and {other}" for one, other in self.overlaps[:_NAMED])
            text.append(
                f"warning: {len(self.overlaps)} pairs of scenes show the same ground and are in different splits, so "
                f"scores will be too high: {pairs}{', ...' if len(self.overlaps) > _NAMED else ''}"
            )
        if self.idle_patterns:
            first = ", ".join(self.idle_patterns[:_NAMED])
            text.append(
                f"{len(self.idle_patterns)} split patterns name no scene: {first}"
                f"{', ...' if len(self.idle_patterns) > _NAMED else ''}"
            )
        for share, names in self.missing.items():
            lacking = [name for name in names if name not in self.absent]
            if lacking:
                text.append(f"labelled share {share} has no pixel of {', '.join(lacking)}")
        if self.absent:
            text.append(
                f"warning: no training tile has a pixel of {', '.join(self.absent)}, which so cannot be learned; "
                "correct label, classes or splits unless that is meant"
            )
        return text


def read_report(dataset: Dataset) -> PackReport:
    """The report of a finished dataset, from its manifest and plan.json."""
    plan = read_plan(dataset)
    manifest = dataset.manifest
    unmatched = [
        UnmatchedScene(
            scene["id"],
            scene["label"]["counted"],
            scene["label"]["unmatched"],
            scene["label"]["unmatched"] / scene["label"]["total"],
            [(entry["value"], entry["count"]) for entry in scene["label"]["unknown"]],
        )
        for scene in plan["scenes"]
        if scene["label"] and scene["label"]["unmatched"]
    ]
    pixels = manifest.splits["train"].pixels
    return PackReport(
        scenes=len(plan["scenes"]),
        unlabelled_scenes=sum(not scene["labelled"] for scene in plan["scenes"]),
        tiles=sum(shard.tiles for shard in manifest.shards),
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        empty=sum(scene["empty"] for scene in plan["scenes"]),
        dropped=plan["dropped"],
        left_out=plan["left_out"],
        overlaps=[] if manifest.protocol == "paper" else overlapping(plan["scenes"]),
        unmatched=unmatched,
        idle_patterns=plan["idle_patterns"],
        missing=manifest.labelled.missing,
        absent=[name for name, count in zip(manifest.class_names, pixels, strict=True) if not count],
    )


def read_plan(dataset: Dataset) -> dict[str, Any]:
    """plan.json: inputs with their sizes and hashes, recipe, scenes, the rule by which tiles are placed.

    Raises:
        InputError: when it is missing or damaged.
    """
    path = dataset.root / PLAN
    if dataset.store is not None:
        dataset.store.fetch(PLAN, dataset.manifest.plan_sha256, check=True)
    try:
        plan: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise InputError(f"{path}: is missing or damaged; pack the dataset again with --fresh") from None
    return plan
