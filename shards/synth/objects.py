"""The things that stand in a town: buildings, trees, hedges, vehicles, pools, containers. Lengths in metres."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shards.synth.canvas import (
    BUILDING,
    CAR,
    CLUTTER,
    IMPERVIOUS,
    LOW_VEGETATION,
    TREE,
    Bools,
    Canvas,
    Color,
    Floats,
    Material,
    Window,
)

CAR_COLORS: tuple[Color, ...] = (
    (0.86, 0.86, 0.85), (0.86, 0.86, 0.85), (0.76, 0.78, 0.82), (0.10, 0.10, 0.11), (0.08, 0.10, 0.20),
    (0.66, 0.09, 0.08), (0.10, 0.22, 0.58), (0.16, 0.34, 0.20), (0.80, 0.66, 0.12),
)  # fmt: skip
CONTAINER_COLORS: tuple[Color, ...] = (
    (0.62, 0.22, 0.12), (0.12, 0.32, 0.60), (0.16, 0.46, 0.30), (0.70, 0.68, 0.64), (0.80, 0.52, 0.10),
)  # fmt: skip


Size = tuple[float, float]  # length and width


@dataclass(frozen=True)
class Place:
    """Where an object stands: its middle and the direction of its long axis (radians)."""

    x: float
    y: float
    angle: float

    def moved(self, along: float, across: float, turn: float = 0.0) -> Place:
        """The place this far along and across the own axis, turned by ``turn``."""
        cos, sin = float(np.cos(self.angle)), float(np.sin(self.angle))
        return Place(self.x + along * cos - across * sin, self.y + along * sin + across * cos, self.angle + turn)


def rectangle(canvas: Canvas, at: Place, length: float, width: float, class_id: int, material: Material) -> None:
    """A flat patch of ground."""
    window = canvas.window(at.x, at.y, 0.5 * float(np.hypot(length, width)), at.angle)
    color = canvas.shade(material, window.at, window.along)
    slope = material.relief * canvas.textures.leaves[(slice(None), *window.at)]
    canvas.paint(window.at, window.inside(length / 2, width / 2), class_id, color, 0.0, slope)


def disc(canvas: Canvas, at: Place, radius: float, class_id: int, material: Material, ragged: float = 0.2) -> None:
    """A round patch of ground with an irregular outline: pond, sand pit, worn spot."""
    window = canvas.window(at.x, at.y, radius * 1.6, at.angle)
    edge = 1.0 + ragged * canvas.textures.patch[window.at]
    mask = np.hypot(window.along, 1.4 * window.across) <= radius * edge
    slope = material.relief * canvas.textures.leaves[(slice(None), *window.at)]
    canvas.paint(window.at, mask, class_id, canvas.shade(material, window.at), 0.0, slope)


def flat_roof(canvas: Canvas, rng: np.random.Generator, at: Place, size: Size, eave: float, material: Material) -> None:
    """A building with a flat roof: parapet, machines, skylights or solar panels on it."""
    length, width = size
    window = canvas.window(at.x, at.y, 0.5 * float(np.hypot(length, width)), at.angle)
    inside = window.inside(length / 2, width / 2)
    color = canvas.shade(material, window.at)
    rim = inside & ~window.inside(length / 2 - 0.4, width / 2 - 0.4)
    if rng.random() < 0.6:
        color[rim] *= np.float32(rng.uniform(0.8, 1.35))
    canvas.paint(window.at, inside, BUILDING, color, eave)
    if rng.random() < 0.25:
        _panels(canvas, at, (length - 3.0, width - 3.0), eave + 0.3, rng)
        return
    unit = Material((0.62, 0.62, 0.60), 0.03) if rng.random() < 0.6 else Material((0.30, 0.33, 0.36), 0.03)
    for _ in range(rng.poisson(length * width / 70.0)):
        spot = at.moved(rng.uniform(-0.42, 0.42) * length, rng.uniform(-0.42, 0.42) * width)
        _box(canvas, spot, rng.uniform(0.8, 2.4), rng.uniform(0.8, 1.8), eave + rng.uniform(0.3, 1.4), unit)


def _box(canvas: Canvas, at: Place, length: float, width: float, top: float, material: Material) -> None:
    window = canvas.window(at.x, at.y, 0.5 * float(np.hypot(length, width)), at.angle)
    mask = window.inside(length / 2, width / 2) & (canvas.ids[window.at] == BUILDING)
    canvas.paint(window.at, mask, BUILDING, canvas.shade(material, window.at), top)


def _panels(canvas: Canvas, at: Place, size: tuple[float, float], top: float, rng: np.random.Generator) -> None:
    glass = Material((0.13, 0.16, 0.26), 0.02, stripe=0.25, period=1.6)
    length, width = (max(s * rng.uniform(0.4, 1.0), 1.0) for s in size)
    window = canvas.window(at.x, at.y, 0.5 * float(np.hypot(length, width)), at.angle)
    mask = window.inside(length / 2, width / 2) & (np.mod(window.across + 50.0, 2.4) < 1.6)
    canvas.paint(window.at, mask, BUILDING, canvas.shade(glass, window.at, window.along), top)


def pitched_roof(
    canvas: Canvas, rng: np.random.Generator, at: Place, size: Size, eave: float, material: Material
) -> None:
    """A building with a gabled or hipped roof whose ridge runs along the long axis."""
    length, width = size
    window = canvas.window(at.x, at.y, 0.5 * float(np.hypot(length, width)), at.angle)
    pitch = float(rng.uniform(0.35, 0.95))
    to_side, to_end = width / 2 - np.abs(window.across), length / 2 - np.abs(window.along)
    hipped = bool(rng.random() < 0.3)
    on_end = (to_end < to_side) if hipped else np.zeros(to_side.shape, dtype=np.bool_)
    rise = pitch * np.where(on_end, to_end, to_side)
    along = np.where(on_end, -pitch * np.sign(window.along), 0.0).astype(np.float32)
    across = np.where(on_end, 0.0, -pitch * np.sign(window.across)).astype(np.float32)
    color = canvas.shade(material, window.at, np.where(on_end, window.along, window.across).astype(np.float32))
    ridge = (np.abs(window.across) < 0.2) & ~on_end
    color[ridge] *= np.float32(rng.uniform(0.85, 1.2))
    top = (eave + rise).astype(np.float32)
    canvas.paint(window.at, window.inside(length / 2, width / 2), BUILDING, color, top, window.slope(along, across))
    _roof_details(canvas, rng, at, size, eave, pitch)


def _roof_details(canvas: Canvas, rng: np.random.Generator, at: Place, size: Size, eave: float, pitch: float) -> None:
    length, width = size
    top = eave + pitch * width / 2
    if rng.random() < 0.6:
        chimney = Material((0.40, 0.30, 0.27), 0.04)
        spot = at.moved(rng.uniform(-0.35, 0.35) * length, rng.uniform(-0.2, 0.2) * width)
        _box(canvas, spot, 0.9, 0.8, top + 0.7, chimney)
    side = float(rng.choice([-1.0, 1.0]))
    if rng.random() < 0.2:
        spot = at.moved(0.0, side * width / 4)
        _panels(canvas, spot, (length * 0.7, width * 0.35), top, rng)
    elif rng.random() < 0.4:
        window = Material((0.24, 0.29, 0.36), 0.02)
        for _ in range(int(rng.integers(1, 5))):
            spot = at.moved(rng.uniform(-0.4, 0.4) * length, side * width * 0.27)
            _box(canvas, spot, 1.0, 1.0, top - 0.2 * pitch * width, window)


def tree(canvas: Canvas, rng: np.random.Generator, x: float, y: float, radius: float, material: Material) -> None:
    """One crown: ragged outline, leafy bumps, a dome or a cone, taller than wide."""
    window = canvas.window(x, y, radius * 1.5, 0.0)
    lobes = rng.uniform(0.0, 2.0 * np.pi, 3)
    bearing = np.arctan2(window.across, window.along)
    edge = 1.0 + 0.10 * canvas.textures.mottle[window.at]
    for count, depth, phase in zip((2, 3, 5), (0.10, 0.08, 0.06), lobes, strict=True):
        edge += np.float32(depth) * np.sin(count * bearing + phase)
    edge *= np.float32(radius)
    distance = np.hypot(window.along, window.across)
    part = np.clip(distance / np.maximum(edge, 0.3), 0.0, 1.0)
    conifer = bool(rng.random() < 0.2)
    trunk = rng.uniform(0.4, 1.4) * radius + 1.0
    crown = 2.4 * radius * (1.0 - part) if conifer else 1.1 * radius * np.sqrt(1.0 - 0.95 * part * part)
    steep = 0.9 if conifer else 0.8 * part
    outward = -steep / np.maximum(distance, 0.2)
    dome = np.stack([outward * window.along, outward * window.across])
    slope = dome + material.relief * canvas.textures.leaves[(slice(None), *window.at)]
    mask = (distance <= edge) & (canvas.textures.grain[window.at] < 2.6 - 1.6 * part**6)
    color = canvas.shade(material.tinted(rng, 0.10, 0.03), window.at)
    canvas.paint(window.at, mask, TREE, color, (trunk + crown).astype(np.float32), slope.astype(np.float32))


def hedge(canvas: Canvas, rng: np.random.Generator, at: Place, length: float, material: Material) -> None:
    """A clipped hedge: as green and leafy as a crown, but low vegetation."""
    width = float(rng.uniform(0.7, 1.4))
    window = canvas.window(at.x, at.y, length / 2 + 1.0, at.angle)
    half = width / 2 * (1.0 + 0.25 * canvas.textures.mottle[window.at])
    mask = (np.abs(window.along) <= length / 2) & (np.abs(window.across) <= half)
    mask &= canvas.ids[window.at] == LOW_VEGETATION
    slope = canvas.textures.leaves[(slice(None), *window.at)] * material.relief
    canvas.paint(window.at, mask, LOW_VEGETATION, canvas.shade(material, window.at), rng.uniform(0.8, 1.7), slope)


def shrubs(canvas: Canvas, rng: np.random.Generator, x: float, y: float, radius: float, material: Material) -> None:
    """A group of low bushes: low vegetation that looks like small crowns and casts a short shadow."""
    window = canvas.window(x, y, radius * 1.6)
    distance = np.hypot(window.along, window.across)
    mask = distance <= radius * (1.0 + 0.25 * canvas.textures.patch[window.at])
    mask &= canvas.ids[window.at] == LOW_VEGETATION
    slope = canvas.textures.leaves[(slice(None), *window.at)] * material.relief
    color = canvas.shade(material.tinted(rng, 0.08, 0.03), window.at)
    canvas.paint(window.at, mask, LOW_VEGETATION, color, rng.uniform(0.4, 1.1), slope)


def car(canvas: Canvas, rng: np.random.Generator, at: Place) -> None:
    """A car, now and then a van: painted body, dark windows, lighter roof."""
    van = rng.random() < 0.15
    length, width = (rng.uniform(5.0, 6.8), 2.1) if van else (rng.uniform(3.7, 4.9), rng.uniform(1.7, 1.95))
    window = canvas.window(at.x, at.y, length, at.angle + rng.normal(0.0, 0.03))
    round_end = 0.25 * np.clip(np.abs(window.along) / (length / 2), 0.0, 1.0) ** 6
    mask = (np.abs(window.along) <= length / 2) & (np.abs(window.across) <= width / 2 - round_end)
    paint = Material(CAR_COLORS[int(rng.integers(len(CAR_COLORS)))], 0.02).tinted(rng, 0.12, 0.03)
    color = canvas.shade(paint, window.at)
    front = window.along / length
    glass = ((front > 0.08) & (front < 0.22)) | ((front < -0.30) & (front > -0.40) & (not van))
    color[glass & (np.abs(window.across) < 0.42 * width)] = (0.08, 0.09, 0.11)
    cabin = (front > -0.30) & (front < 0.08)
    color[cabin] *= np.float32(1.08)
    top = np.where(cabin | glass, 1.5, 1.0) + (0.9 if van else 0.0)
    _stand(canvas, window, mask, CAR, color, top.astype(np.float32))


def _stand(canvas: Canvas, window: Window, mask: Bools, class_id: int, color: Floats, top: Floats) -> None:
    """Paint a thing that stands on the ground, never on a roof."""
    ground = np.isin(canvas.ids[window.at], (IMPERVIOUS, LOW_VEGETATION, CLUTTER))
    canvas.paint(window.at, mask & ground, class_id, color, top)


def container(canvas: Canvas, rng: np.random.Generator, at: Place) -> None:
    """A freight container or skip: a coloured box with ribs."""
    color = CONTAINER_COLORS[int(rng.integers(len(CONTAINER_COLORS)))]
    ribs = replace(Material(color, 0.03, 0.04, 0.03).tinted(rng, 0.12, 0.04), stripe=0.10, period=0.9)
    length = float(rng.choice([3.5, 6.1, 12.2]))
    window = canvas.window(at.x, at.y, length, at.angle)
    top = np.full(window.along.shape, rng.choice([2.6, 5.2]), dtype=np.float32)
    _stand(canvas, window, window.inside(length / 2, 1.25), CLUTTER, canvas.shade(ribs, window.at, window.along), top)


def pool(canvas: Canvas, rng: np.random.Generator, at: Place) -> None:
    """A swimming pool with a paved rim."""
    length, width = rng.uniform(5.0, 9.0), rng.uniform(2.8, 4.5)
    rectangle(canvas, at, length + 1.6, width + 1.6, IMPERVIOUS, Material((0.62, 0.58, 0.52), 0.03))
    water = Material((0.22, 0.52, 0.60), 0.02, 0.04, 0.02).tinted(rng, 0.15, 0.06)
    rectangle(canvas, at, length, width, CLUTTER, water)
