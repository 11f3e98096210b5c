"""The plan of a town: streets divide it into blocks, each block is built up in the manner of its district."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.synth import districts
from shards.synth.canvas import IMPERVIOUS, LOW_VEGETATION, Canvas, Floats, Material, value_noise
from shards.synth.look import DISTRICTS, Look
from shards.synth.objects import Place, car, tree


@dataclass(frozen=True)
class Box:
    """A rectangle in the town's own axes (metres from the middle of the canvas)."""

    u0: float
    u1: float
    v0: float
    v1: float


@dataclass(frozen=True)
class Street:
    """A street's box with its sidewalks; ``along_u`` says which way it runs, ``kerb`` how wide a sidewalk is."""

    box: Box
    along_u: bool
    kerb: float
    parking: bool


class Frame:
    """The town's axes on the canvas: turned by one angle and gently bent, so that no street is quite straight."""

    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None:
        rows, cols = canvas.shape
        self.canvas = canvas
        self.angle = float(rng.uniform(0.0, np.pi))
        self.middle = (0.5 * cols * canvas.gsd, 0.5 * rows * canvas.gsd)
        bend = rng.uniform(0.0, 2.5)
        self.bends = [bend * value_noise(rng, canvas.shape, 55.0 / canvas.gsd) for _ in range(2)]
        self.slack = float(np.hypot(*(np.abs(bend).max() for bend in self.bends)))
        window = canvas.window(*self.middle, max(rows, cols) * canvas.gsd, self.angle)
        self.u: Floats = window.along + self.bends[0]
        self.v: Floats = window.across + self.bends[1]

    def reach(self) -> float:
        """Half the diagonal of the canvas."""
        return float(np.hypot(*self.middle))

    def place(self, u: float, v: float, turn: float = 0.0) -> Place:
        """Where (u, v) lies on the canvas; ``turn`` is the object's direction against the u axis."""
        rough = Place(*self.middle, self.angle).moved(u, v)
        row = int(np.clip(rough.y / self.canvas.gsd, 0, self.canvas.shape[0] - 1))
        col = int(np.clip(rough.x / self.canvas.gsd, 0, self.canvas.shape[1] - 1))
        bend_u, bend_v = (float(bend[row, col]) for bend in self.bends)
        moved = Place(*self.middle, self.angle).moved(u - bend_u, v - bend_v)
        return Place(moved.x, moved.y, self.angle + turn)

    def fill(self, box: Box, class_id: int, material: Material) -> None:
        """Pave or sow a box of ground."""
        middle = Place(*self.middle, self.angle).moved(0.5 * (box.u0 + box.u1), 0.5 * (box.v0 + box.v1))
        reach = 0.5 * float(np.hypot(box.u1 - box.u0, box.v1 - box.v0)) + self.slack
        at = self.canvas.window(middle.x, middle.y, reach).at
        u, v = self.u[at], self.v[at]
        inside = (u >= box.u0) & (u < box.u1) & (v >= box.v0) & (v < box.v1)
        slope = material.relief * self.canvas.textures.leaves[(slice(None), *at)]
        self.canvas.paint(at, inside, class_id, self.canvas.shade(material, at, u), 0.0, slope)


def build(canvas: Canvas, look: Look, rng: np.random.Generator) -> None:
    """Lay out one town on an empty canvas."""
    frame = Frame(rng, canvas)
    reach = frame.reach() + 10.0
    streets: list[Street] = []
    blocks: list[Box] = []
    _divide(rng, Box(-reach, reach, -reach, reach), 0, streets, blocks)
    frame.fill(Box(-2 * reach, 2 * reach, -2 * reach, 2 * reach), LOW_VEGETATION, look.lawn)
    for street in reversed(streets):  # the main streets last: they pass over the mouths of the side streets
        _pave(frame, look, rng, street)
    weights = np.asarray(look.districts) / sum(look.districts)
    for block in blocks:
        kind = DISTRICTS[int(rng.choice(len(DISTRICTS), p=weights))]
        districts.BUILDERS[kind](districts.Site(frame, look, rng, block))
    for street in streets:
        _furnish(frame, look, rng, street)


def _divide(rng: np.random.Generator, box: Box, depth: int, streets: list[Street], blocks: list[Box]) -> None:
    """Split the longer side of a box by a street until blocks have the size of blocks."""
    du, dv = box.u1 - box.u0, box.v1 - box.v0
    if max(du, dv) < rng.uniform(48.0, 84.0):
        blocks.append(box)
        return
    kerb = float(rng.uniform(1.2, 2.2))
    parking = bool(rng.random() < 0.4)
    half = float(rng.uniform(3.4, 5.0) if depth < 2 else rng.uniform(2.1, 3.2)) + kerb + (2.2 if parking else 0.0)
    cut = float(rng.uniform(0.36, 0.64))
    if du >= dv:
        at = box.u0 + cut * du
        streets.append(Street(Box(at - half, at + half, box.v0, box.v1), False, kerb, parking))
        parts = Box(box.u0, at - half, box.v0, box.v1), Box(at + half, box.u1, box.v0, box.v1)
    else:
        at = box.v0 + cut * dv
        streets.append(Street(Box(box.u0, box.u1, at - half, at + half), True, kerb, parking))
        parts = Box(box.u0, box.u1, box.v0, at - half), Box(box.u0, box.u1, at + half, box.v1)
    for part in parts:
        _divide(rng, part, depth + 1, streets, blocks)


def _strip(street: Street, low: float, high: float) -> Box:
    """The lengthwise strip of a street between two distances from its middle line."""
    box = street.box
    if street.along_u:
        middle = 0.5 * (box.v0 + box.v1)
        return Box(box.u0, box.u1, middle + low, middle + high)
    middle = 0.5 * (box.u0 + box.u1)
    return Box(middle + low, middle + high, box.v0, box.v1)


def _half(street: Street) -> float:
    box = street.box
    return 0.5 * ((box.v1 - box.v0) if street.along_u else (box.u1 - box.u0))


def _pave(frame: Frame, look: Look, rng: np.random.Generator, street: Street) -> None:
    half = _half(street)
    verge = bool(rng.random() < 0.25)
    frame.fill(_strip(street, -half, half), IMPERVIOUS, look.pavement)
    if verge:
        for side in (-half + 0.5, half - 1.3):
            frame.fill(_strip(street, side, side + 0.8), LOW_VEGETATION, look.lawn)
    road = look.road.tinted(rng, 0.06, 0.01)
    frame.fill(_strip(street, -half + street.kerb, half - street.kerb), IMPERVIOUS, road)
    if street.parking:
        bay = look.yard if rng.random() < 0.5 else road
        for low in (-half + street.kerb, half - street.kerb - 2.2):
            frame.fill(_strip(street, low, low + 2.2), IMPERVIOUS, bay)
    if look.markings and rng.random() < 0.8:
        _dashes(frame, look, street)


def _dashes(frame: Frame, look: Look, street: Street) -> None:
    box = street.box
    white = Material((look.markings,) * 3, 0.03, 0.03)
    start, end = (box.u0, box.u1) if street.along_u else (box.v0, box.v1)
    for low in np.arange(start + 2.0, end - 3.0, 6.0).tolist():
        line = _strip(street, -0.14, 0.14)
        dash = Box(low, low + 3.0, line.v0, line.v1) if street.along_u else Box(line.u0, line.u1, low, low + 3.0)
        frame.fill(dash, IMPERVIOUS, white)


def _furnish(frame: Frame, look: Look, rng: np.random.Generator, street: Street) -> None:
    """Cars that drive and park along a street, and the trees of an avenue."""
    half, box = _half(street), street.box
    middle = 0.5 * ((box.v0 + box.v1) if street.along_u else (box.u0 + box.u1))
    start, end = (box.u0, box.u1) if street.along_u else (box.v0, box.v1)

    def spot(along: float, side: float) -> Place:
        if street.along_u:
            return frame.place(along, middle + side)
        return frame.place(middle + side, along, np.pi / 2)

    for sign in (-1.0, 1.0):
        if street.parking:
            for along in np.arange(start, end, 6.0).tolist():
                if rng.random() < look.traffic * 0.8:
                    car(frame.canvas, rng, spot(along + rng.normal(0.0, 0.3), sign * (half - street.kerb - 1.1)))
        for _ in range(rng.poisson((end - start) / 60.0 * look.traffic)):
            car(frame.canvas, rng, spot(rng.uniform(start, end), sign * 0.3 * (half - street.kerb)))
        if rng.random() < 0.4 * look.greenery:
            kind = look.trees[int(rng.integers(len(look.trees)))]
            for along in np.arange(start, end, rng.uniform(8.0, 14.0)).tolist():
                at = spot(along, sign * (half - 0.8))
                if frame.canvas.is_free(at.x, at.y, (IMPERVIOUS, LOW_VEGETATION)) and rng.random() < 0.8:
                    tree(frame.canvas, rng, at.x, at.y, rng.uniform(1.6, 3.2), kind)
