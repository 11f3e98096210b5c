"""Scenes of different splits that show the same ground: what a network has seen there it would be tested on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds

LEAST = 0.01  # of the smaller scene: neighbours that touch, or overlap by rounding, are no leak

Box = tuple[float, float, float, float]  # west, south, east, north


@dataclass(frozen=True)
class _Placed:
    """A scene with a place: its box in degrees (in its own coordinates where it has no CRS), and in its own CRS."""

    scene: Mapping[str, Any]
    degrees: Box
    own: Box

    @property
    def has_crs(self) -> bool:
        return self.scene["crs"] is not None


def overlapping(scenes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of scenes of a plan (``plan.json``) that overlap on the ground and have tiles of different splits.

    Bounding boxes are compared: in the CRS of both where it is one, else in degrees; scenes without a CRS in their own
    coordinates.
    """
    placed = [found for scene in scenes if (found := _place(scene))]
    placed.sort(key=lambda entry: (entry.has_crs, entry.degrees[0]))
    return sorted(_pairs(placed))


def _pairs(placed: Sequence[_Placed]) -> Iterator[tuple[str, str]]:
    for number, one in enumerate(placed):
        for other in placed[number + 1 :]:
            if other.has_crs != one.has_crs or other.degrees[0] >= one.degrees[2]:
                break
            same = one.scene["crs"] == other.scene["crs"]
            shared = _shared(one.own, other.own) if same else _shared(one.degrees, other.degrees)
            if shared >= LEAST and len(_splits(one.scene) | _splits(other.scene)) > 1:
                first, second = sorted((str(one.scene["id"]), str(other.scene["id"])))
                yield first, second


def _splits(scene: Mapping[str, Any]) -> set[str]:
    return {name for name, tiles in scene["tiles"].items() if tiles}


def _shared(one: Box, other: Box) -> float:
    """Part of the smaller box that both cover."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0.0, width) * max(0.0, height) / smaller if smaller > 0 else 0.0


def _place(scene: Mapping[str, Any]) -> _Placed | None:
    """None where a scene has no place, or none that can be told in degrees."""
    a, b, c, d, e, f = scene["transform"]
    if (a, b, c, d, e, f) == (1, 0, 0, 0, 1, 0):
        return None
    corners = [(x, y) for x in (0, scene["width"]) for y in (0, scene["height"])]
    xs, ys = zip(*((a * x + b * y + c, d * x + e * y + f) for x, y in corners), strict=True)
    box = (min(xs), min(ys), max(xs), max(ys))
    if scene["crs"] is None:
        return _Placed(scene, box, box)
    try:
        return _Placed(scene, transform_bounds(CRS.from_wkt(scene["crs"]), CRS.from_epsg(4326), *box), box)
    except RasterioError:
        return None  # a CRS of its own, such as that of a site
