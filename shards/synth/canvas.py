"""What a scene is painted on, and the textures that it is painted with.

Everything lies on one pixel grid: what a pixel is (class id), its reflectance, its height above the ground in metres
and the slope of its surface. Light and camera (:mod:`shards.synth.light`) work on these alone.
Lengths are metres, x to the right and y down from the upper left corner of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.uint8]
Color = tuple[float, float, float]

IMPERVIOUS: Final = 0
BUILDING: Final = 1
LOW_VEGETATION: Final = 2
TREE: Final = 3
CAR: Final = 4
CLUTTER: Final = 5


def value_noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> Floats:
    """Smooth random field float32 [H,W], mean 0 and standard deviation about 1, whose grains are ``cell`` pixels."""
    offset = rng.uniform(0.0, 1.0, 2)
    axes = [np.arange(n) / cell + o for n, o in zip(shape, offset, strict=True)]
    whole = [axis.astype(np.int64) for axis in axes]
    part = [(axis - low).astype(np.float32) for axis, low in zip(axes, whole, strict=True)]
    rows, cols = ((3.0 - 2.0 * p) * p * p for p in part)
    knots = rng.standard_normal((int(whole[0][-1]) + 2, int(whole[1][-1]) + 2), dtype=np.float32)
    lines = knots[whole[0]] * (1.0 - rows)[:, None] + knots[whole[0] + 1] * rows[:, None]
    field = lines[:, whole[1]] * (1.0 - cols) + lines[:, whole[1] + 1] * cols
    return np.asarray(field * 1.35, dtype=np.float32)


@dataclass(frozen=True)
class Textures:
    """Random fields of one scene, float32 [H,W], from pixel grain to slow drifts; ``leaves`` is a slope [2,H,W]."""

    grain: Floats
    mottle: Floats
    patch: Floats
    drift: Floats
    leaves: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, shape: tuple[int, int], gsd: float) -> Textures:
        """Draw the fields for a canvas of ``shape`` pixels of ``gsd`` metres."""
        grain = rng.standard_normal(shape, dtype=np.float32)
        mottle = value_noise(rng, shape, 0.8 / gsd)
        patch = value_noise(rng, shape, 3.0 / gsd)
        drift = value_noise(rng, shape, 14.0 / gsd)
        bumps = 0.45 * value_noise(rng, shape, 1.2 / gsd) + 0.22 * value_noise(rng, shape, 0.55 / gsd)
        down, right = np.gradient(bumps, gsd)
        return cls(grain, mottle, patch, drift, np.stack([right, down]).astype(np.float32))


@dataclass(frozen=True)
class Material:
    """A reflectance and how strongly each texture modulates it (relative amplitudes)."""

    color: Color
    grain: float = 0.03
    mottle: float = 0.03
    patch: float = 0.03
    drift: float = 0.03
    relief: float = 0.0  # part of the leafy bumps that its surface has
    stripe: float = 0.0  # amplitude of rows across the surface: tiles, seams, furrows
    period: float = 1.0  # metres between two rows

    def tinted(self, rng: np.random.Generator, value: float, hue: float = 0.0) -> Material:
        """The same material of one object: brightness varied by ``value``, each channel by ``hue`` (relative)."""
        gain = (1.0 + rng.normal(0.0, value)) * (1.0 + rng.normal(0.0, hue, 3))
        red, green, blue = (float(np.clip(c * g, 0.02, 0.95)) for c, g in zip(self.color, gain, strict=True))
        return Material(
            (red, green, blue), self.grain, self.mottle, self.patch, self.drift, self.relief, self.stripe, self.period
        )


@dataclass(frozen=True)
class Window:
    """A piece of the canvas around a point, and its pixels in the frame of an object turned by ``angle``."""

    at: tuple[slice, slice]
    along: Floats  # metres from the point along the object's axis, [h,w]
    across: Floats
    angle: float

    def inside(self, half_along: float, half_across: float) -> Bools:
        """Pixels of the rectangle of these half sizes (metres)."""
        return (np.abs(self.along) <= half_along) & (np.abs(self.across) <= half_across)

    def slope(self, along: Floats, across: Floats) -> Floats:
        """A slope given in the object's frame as [2,h,w] in the canvas frame."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.stack([along * cos - across * sin, along * sin + across * cos]).astype(np.float32)


class Canvas:
    """The layers of one scene, all [H,W] of the same grid."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int], gsd: float) -> None:
        self.gsd = gsd
        self.shape = shape
        self.textures = Textures.draw(rng, shape, gsd)
        self.ids: Ids = np.full(shape, LOW_VEGETATION, dtype=np.uint8)
        self.color: Floats = np.zeros((*shape, 3), dtype=np.float32)
        self.height: Floats = np.zeros(shape, dtype=np.float32)
        self.slope: Floats = np.zeros((2, *shape), dtype=np.float32)

    def window(self, x: float, y: float, reach: float, angle: float = 0.0) -> Window:
        """The pixels within ``reach`` metres of (x, y); empty when that lies off the canvas."""
        bounds = []
        for middle, size in ((y, self.shape[0]), (x, self.shape[1])):
            low = min(max(int((middle - reach) / self.gsd), 0), size)
            bounds.append((low, min(max(int((middle + reach) / self.gsd) + 2, low), size)))
        down = ((np.arange(*bounds[0], dtype=np.float32) + 0.5) * self.gsd - y)[:, None]
        right = ((np.arange(*bounds[1], dtype=np.float32) + 0.5) * self.gsd - x)[None, :]
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        along = (right * cos + down * sin).astype(np.float32)
        across = (down * cos - right * sin).astype(np.float32)
        return Window((slice(*bounds[0]), slice(*bounds[1])), along, across, angle)

    def whole(self) -> tuple[slice, slice]:
        """The window of the whole canvas."""
        return slice(0, self.shape[0]), slice(0, self.shape[1])

    def shade(self, material: Material, at: tuple[slice, slice], rows: Floats | None = None) -> Floats:
        """The reflectance [h,w,3] of a material in a window; stripes follow the coordinate ``rows`` (metres)."""
        tex = self.textures
        gain = 1.0 + material.grain * tex.grain[at] + material.mottle * tex.mottle[at]
        gain += material.patch * tex.patch[at] + material.drift * tex.drift[at]
        if material.stripe and rows is not None:
            gain = gain + material.stripe * np.sin(rows * np.float32(2.0 * np.pi / material.period))
        # Slow changes of hue, not of brightness alone: dry spots in a lawn, worn asphalt.
        warm = (material.patch * 0.5) * tex.drift[at]
        tint = np.stack([gain + warm, gain, gain - warm], axis=-1)
        return np.asarray(np.maximum(tint * np.asarray(material.color), 0.005), dtype=np.float32)

    def paint(
        self,
        at: tuple[slice, slice],
        mask: Bools,
        class_id: int,
        color: Floats,
        height: Floats | float = 0.0,
        slope: Floats | None = None,
    ) -> None:
        """Put a surface where ``mask`` holds and nothing higher stands already."""
        top = np.broadcast_to(np.asarray(height, dtype=np.float32), mask.shape)
        mask = mask & (top >= self.height[at])
        self.ids[at][mask] = class_id
        self.color[at][mask] = color[mask]
        self.height[at][mask] = top[mask]
        for axis in range(2):
            self.slope[axis][at][mask] = 0.0 if slope is None else slope[axis][mask]

    def is_free(self, x: float, y: float, classes: tuple[int, ...]) -> bool:
        """Whether the pixel at (x, y) is on the canvas and of one of the classes."""
        row, col = int(y / self.gsd), int(x / self.gsd)
        inside = 0 <= row < self.shape[0] and 0 <= col < self.shape[1]
        return inside and int(self.ids[row, col]) in classes
