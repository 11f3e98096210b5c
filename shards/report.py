"""What packing has to say, read from the finished dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from shards.errors import InputError
from shards.manifest import Dataset

PLAN = "plan.json"

_NAMED = 5  # split patterns without a scene that are listed


@dataclass(frozen=True)
class UnmatchedScene:
    """A scene some of whose label pixels have colours that the recipe does not know; they became ignore."""

    scene: str
    pixels: int
    share: float
    colors: list[tuple[tuple[int, int, int], int]]  # the most frequent ones with their pixels


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
    unmatched: list[UnmatchedScene]
    idle_patterns: list[str]  # split patterns that name no scene
    missing: dict[str, list[str]]  # labelled share -> classes that it lacks

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
            colors = ", ".join(f"{r},{g},{b} ({count})" for (r, g, b), count in scene.colors)
            text.append(
                f"scene {scene.scene}: {scene.pixels} label pixels ({scene.share:.3%}) of unknown colour "
                f"became ignore: {colors}"
            )
        if self.idle_patterns:
            first = ", ".join(self.idle_patterns[:_NAMED])
            text.append(
                f"{len(self.idle_patterns)} split patterns name no scene: {first}"
                f"{', ...' if len(self.idle_patterns) > _NAMED else ''}"
            )
        for share, names in self.missing.items():
            if names:
                text.append(f"labelled share {share} has no pixel of {', '.join(names)}")
        return text


def read_report(dataset: Dataset) -> PackReport:
    """The report of a finished dataset, from its manifest and plan.json."""
    plan = read_plan(dataset)
    manifest = dataset.manifest
    unmatched = [
        UnmatchedScene(
            scene["id"],
            scene["unmatched"],
            scene["unmatched"] / scene["label_pixels"],
            [(tuple(entry["color"]), entry["pixels"]) for entry in scene["unknown_colors"]],
        )
        for scene in plan["scenes"]
        if scene["unmatched"]
    ]
    return PackReport(
        scenes=len(plan["scenes"]),
        unlabelled_scenes=sum(not scene["labelled"] for scene in plan["scenes"]),
        tiles=sum(shard.tiles for shard in manifest.shards),
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        empty=sum(scene["empty"] for scene in plan["scenes"]),
        dropped=plan["dropped"],
        unmatched=unmatched,
        idle_patterns=plan["idle_patterns"],
        missing=manifest.labelled.missing,
    )


def read_plan(dataset: Dataset) -> dict[str, Any]:
    """plan.json: inputs with their sizes and hashes, recipe, scenes, the rule by which tiles are placed.

    Raises:
        InputError: when it is missing or damaged.
    """
    path = dataset.root / PLAN
    try:
        plan: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise InputError(f"{path}: is missing or damaged; pack the dataset again with --fresh") from None
    return plan
