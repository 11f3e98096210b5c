"""Scenes of different splits that show the same ground: what a network has seen there it would be tested on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds

LEAST = 0.01  # of the smaller scene: neighbours that touch, or overlap by rounding, are no leak

Box = tuple[float, float, float, float]  # west, south, east, north


def overlapping(scenes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of scenes of a plan (``plan.json``) that overlap on the ground and have tiles of different splits.

    Bounding boxes are compared: in degrees where scenes have a CRS, in their own coordinates where they have none.
    """
    placed = [(kind, box, scene) for scene in scenes if (found := _box(scene)) for kind, box in [found]]
    placed.sort(key=lambda entry: (entry[0], entry[1][0]))
    return sorted(_pairs(placed))


def _pairs(placed: Sequence[tuple[bool, Box, Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    for place, (kind, box, scene) in enumerate(placed):
        for other_kind, other_box, other in placed[place + 1 :]:
            if other_kind != kind or other_box[0] >= box[2]:
                break
            if _shared(box, other_box) >= LEAST and len(_splits(scene) | _splits(other)) > 1:
                first, second = sorted((str(scene["id"]), str(other["id"])))
                yield first, second


def _splits(scene: Mapping[str, Any]) -> set[str]:
    return {name for name, tiles in scene["tiles"].items() if tiles}


def _shared(one: Box, other: Box) -> float:
    """Part of the smaller box that both cover."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0.0, width) * max(0.0, height) / smaller if smaller > 0 else 0.0


def _box(scene: Mapping[str, Any]) -> tuple[bool, Box] | None:
    """Whether a scene has a CRS, and its bounding box; None where it has no place."""
    a, b, c, d, e, f = scene["transform"]
    if (a, b, c, d, e, f) == (1, 0, 0, 0, 1, 0):
        return None
    corners = [(x, y) for x in (0, scene["width"]) for y in (0, scene["height"])]
    xs, ys = zip(*((a * x + b * y + c, d * x + e * y + f) for x, y in corners), strict=True)
    box = (min(xs), min(ys), max(xs), max(ys))
    if scene["crs"] is None:
        return False, box
    try:
        return True, transform_bounds(CRS.from_wkt(scene["crs"]), CRS.from_epsg(4326), *box)
    except RasterioError:
        return None  # a CRS of its own, such as that of a site
