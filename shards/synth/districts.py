"""How a block of a town is built up: one function for each kind of district."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from shards.synth import objects
from shards.synth.canvas import CLUTTER, IMPERVIOUS, LOW_VEGETATION, Material
from shards.synth.look import FLAT, PITCHED, Look
from shards.synth.objects import Place

if TYPE_CHECKING:
    from shards.synth.town import Box, Frame


@dataclass(frozen=True)
class Site:
    """One block with all that its builder needs."""

    frame: Frame
    look: Look
    rng: np.random.Generator
    box: Box

    @property
    def size(self) -> tuple[float, float]:
        """Length along u and along v in metres."""
        return self.box.u1 - self.box.u0, self.box.v1 - self.box.v0

    def spot(self, margin: float = 1.5) -> Place:
        """A random place at least ``margin`` from the block's edge, its middle where the block is too narrow."""
        room_u, room_v = (max(s - 2.0 * margin, 0.0) for s in self.size)
        u, v = 0.5 * (self.box.u0 + self.box.u1), 0.5 * (self.box.v0 + self.box.v1)
        return self.frame.place(u + room_u * self.rng.uniform(-0.5, 0.5), v + room_v * self.rng.uniform(-0.5, 0.5))

    def fill(self, class_id: int, material: Material) -> None:
        """Cover the whole block."""
        self.frame.fill(self.box, class_id, material)

    def building(self, at: Place, size: tuple[float, float], eave: float, flat: bool | None = None) -> None:
        """A building of the town's stock; its long side lies along the place's axis."""
        rng, look = self.rng, self.look
        is_flat = bool(rng.random() < look.flat_share) if flat is None else flat
        if size[0] < size[1]:
            at, size = Place(at.x, at.y, at.angle + np.pi / 2), (size[1], size[0])
        if not is_flat:
            kind = PITCHED[int(rng.choice(len(PITCHED), p=look.pitched))]
            objects.pitched_roof(self.frame.canvas, rng, at, size, eave, kind.tinted(rng, 0.12, 0.03))
            return
        # A flat roof may be sealed with what the streets are made of: only its height and outline tell it apart.
        kind = FLAT[int(rng.choice(len(FLAT), p=look.flat))] if rng.random() < 0.88 else look.road
        objects.flat_roof(self.frame.canvas, rng, at, size, eave, kind.tinted(rng, 0.10, 0.02))

    def trees(self, per_hectare: float, radius: tuple[float, float], margin: float = 1.5) -> None:
        """Scattered trees where the ground is open."""
        area = self.size[0] * self.size[1] / 10_000.0
        for _ in range(self.rng.poisson(per_hectare * area * self.look.greenery)):
            at = self.spot(margin)
            if self.frame.canvas.is_free(at.x, at.y, (LOW_VEGETATION,)):
                self.tree(at, radius)

    def tree(self, at: Place, radius: tuple[float, float]) -> None:
        """One tree of a kind that grows here."""
        kind = self.look.trees[int(self.rng.integers(len(self.look.trees)))]
        objects.tree(self.frame.canvas, self.rng, at.x, at.y, self.rng.uniform(*radius), kind)

    def bushes(self, per_hectare: float) -> None:
        """Groups of shrubs on open ground, of the same leaves as the trees."""
        area = self.size[0] * self.size[1] / 10_000.0
        for _ in range(self.rng.poisson(per_hectare * area)):
            at = self.spot()
            kind = self.look.trees[int(self.rng.integers(len(self.look.trees)))]
            objects.shrubs(self.frame.canvas, self.rng, at.x, at.y, self.rng.uniform(0.7, 2.4), kind)


def houses(site: Site) -> None:
    """Detached houses with gardens in two rows, back to back."""
    site.fill(LOW_VEGETATION, site.look.lawn)
    (du, dv), box, rng = site.size, site.box, site.rng
    along_u = du >= dv
    length, depth = (du, dv) if along_u else (dv, du)
    lots = max(1, round(length / float(rng.uniform(12.5, 18.0))))
    rows = 2 if depth > 34.0 else 1
    for row in range(rows):
        front = 1.0 if row == 0 else -1.0  # the street lies before the first row and behind the second
        for lot in range(lots):
            step, deep = length / lots, depth / rows
            u, v = (lot + 0.5) * step, (row + 0.5) * deep
            if along_u:
                _lot(site, site.frame.place(box.u0 + u, box.v0 + v), step, deep, front)
            else:  # turned by a quarter, across points against u
                _lot(site, site.frame.place(box.u0 + v, box.v0 + u, np.pi / 2), step, deep, -front)
    site.trees(110.0, (1.8, 4.8))
    site.bushes(25.0)


def _lot(site: Site, at: Place, width: float, depth: float, front: float) -> None:
    """One lot; ``at`` has its axis along the street, which lies at -front times half the depth across it."""
    rng, look, canvas = site.rng, site.look, site.frame.canvas
    ground = look.lawn if rng.random() < 0.75 else look.meadow
    objects.rectangle(canvas, at, width, depth, LOW_VEGETATION, ground.tinted(rng, 0.09, 0.04))
    size = float(rng.uniform(8.0, min(14.0, max(8.5, width - 3.0)))), float(rng.uniform(7.5, 12.0))
    back = -depth / 2 + rng.uniform(3.0, 6.0) + size[1] / 2
    house = at.moved(rng.uniform(-1.0, 1.0), front * back)
    drive = at.moved(width / 2 - 2.0, front * (-depth / 2 + 5.5))
    if rng.random() < 0.85:
        objects.rectangle(canvas, drive, 3.0, 11.0, IMPERVIOUS, look.yard.tinted(rng, 0.12, 0.03))
    if rng.random() < 0.6:
        patio = house.moved(rng.uniform(-2.0, 2.0), front * (size[1] / 2 + 1.5))
        objects.rectangle(canvas, patio, rng.uniform(3.0, 8.0), 3.0, IMPERVIOUS, look.pavement.tinted(rng, 0.12, 0.03))
    for edge in (-1.0, 1.0):
        if rng.random() < 0.3:
            kind = look.trees[int(rng.integers(len(look.trees)))]
            objects.hedge(canvas, rng, at.moved(edge * (width / 2 - 0.5), 0.0, np.pi / 2), depth - 2.0, kind)
    garden = front * rng.uniform(0.15, 0.4) * depth
    if rng.random() < 0.28:
        objects.pool(canvas, rng, at.moved(rng.uniform(-0.2, 0.2) * width, garden))
    elif rng.random() < 0.18:
        bed = at.moved(rng.uniform(-0.25, 0.25) * width, garden)
        objects.rectangle(canvas, bed, rng.uniform(3.0, 6.0), rng.uniform(2.5, 5.0), CLUTTER, look.soil)
    site.building(house, size, rng.uniform(3.0, 6.5))
    if rng.random() < 0.3:  # a wing makes the house L-shaped
        wing = house.moved(rng.uniform(-0.3, 0.3) * size[0], front * size[1] * 0.6)
        site.building(wing, (5.0, 5.5), rng.uniform(2.8, 4.5))
    if rng.random() < 0.4:
        garage = at.moved(width / 2 - 2.2, front * (-depth / 2 + 13.0))
        site.building(garage, (3.2, 5.6), 2.5, flat=bool(rng.random() < 0.7))
    if rng.random() < 0.3:
        shed = at.moved(rng.uniform(-0.35, 0.35) * width, front * (depth / 2 - 2.5))
        site.building(shed, (3.2, 2.6), 2.2)
    if rng.random() < look.traffic * 0.8:
        objects.car(canvas, rng, drive.moved(0.0, rng.normal(0.0, 0.8), np.pi / 2))


def slabs(site: Site) -> None:
    """Long blocks of flats on a common lawn, with rows of parked cars between them."""
    site.fill(LOW_VEGETATION, site.look.lawn)
    du, rng, box = site.size[0], site.rng, site.box
    eave = float(rng.uniform(8.0, 15.0))
    width = float(rng.uniform(10.0, 13.0))
    v = box.v0 + 4.0 + width / 2
    while v + width / 2 + 3.0 < box.v1:
        length = float(rng.uniform(0.6, 0.9)) * du
        at = site.frame.place(box.u0 + du / 2 + rng.uniform(-0.05, 0.05) * du, v)
        path = at.moved(0.0, width / 2 + 2.5)
        objects.rectangle(site.frame.canvas, path, du, 1.8, IMPERVIOUS, site.look.pavement)
        if rng.random() < 0.75:
            _bays(site, at.moved(0.0, width / 2 + 9.0), length)
        site.building(at, (length, width), eave)
        v += width + rng.uniform(14.0, 21.0)
    site.trees(110.0, (1.8, 4.8), 2.5)
    site.bushes(20.0)


def _bays(site: Site, at: Place, length: float) -> None:
    """A lane with a row of parking places on one side: 5 m deep, 2.6 m wide each."""
    look, rng, canvas = site.look, site.rng, site.frame.canvas
    objects.rectangle(canvas, at, length, 10.5, IMPERVIOUS, look.road.tinted(rng, 0.08, 0.02))
    line = Material((max(look.markings, 0.45),) * 3, 0.03)
    for offset in np.arange(-length / 2 + 1.5, length / 2 - 1.5, 2.6).tolist():
        bay = at.moved(offset, 2.6)
        if look.markings:
            objects.rectangle(canvas, bay.moved(1.3, 0.0), 0.22, 4.8, IMPERVIOUS, line)
        if rng.random() < look.traffic:
            objects.car(canvas, rng, bay.moved(0.0, rng.normal(0.0, 0.2), float(rng.choice([-1.0, 1.0])) * np.pi / 2))


def court(site: Site) -> None:
    """A closed block: houses wall to wall around a yard."""
    rng, look, box = site.rng, site.look, site.box
    (du, dv) = site.size
    paved = bool(rng.random() < 0.5)
    site.fill(IMPERVIOUS if paved else LOW_VEGETATION, look.yard if paved else look.lawn)
    depth = float(rng.uniform(9.0, 12.0))
    sides = (
        (du, dv / 2 - depth / 2 - 0.5, 0.0), (du, dv / 2 - depth / 2 - 0.5, np.pi),
        (dv - 2 * depth, du / 2 - depth / 2 - 0.5, np.pi / 2), (dv - 2 * depth, du / 2 - depth / 2 - 0.5, -np.pi / 2),
    )  # fmt: skip
    middle = site.frame.place(box.u0 + du / 2, box.v0 + dv / 2)
    for length, away, turn in sides:
        start = -length / 2 + 0.5
        while start < length / 2 - 5.0:
            front = float(min(rng.uniform(9.0, 17.0), length / 2 - start))
            if rng.random() < 0.9:
                at = Place(middle.x, middle.y, middle.angle + turn).moved(start + front / 2, away)
                site.building(at, (front, depth), rng.uniform(7.0, 14.0))
            start += front
    for _ in range(rng.poisson(3.0)):
        size = float(rng.uniform(4.0, 9.0)), float(rng.uniform(3.5, 6.0))
        site.building(site.spot(depth + 3.0), size, rng.uniform(2.5, 4.5), flat=True)
    for _ in range(rng.poisson(5.0 if paved else 1.0)):
        at = site.spot(depth + 2.0)
        objects.car(site.frame.canvas, rng, at.moved(0.0, 0.0, float(rng.choice([0.0, np.pi / 2]))))
    site.trees(120.0, (1.8, 4.5), depth + 1.5)
    _street_trees(site, depth)


def _street_trees(site: Site, margin: float) -> None:
    """Trees in the paved yard of a block, where there is no open ground to look for."""
    for _ in range(site.rng.poisson(3.0 * site.look.greenery)):
        at = site.spot(margin + 2.0)
        if site.frame.canvas.is_free(at.x, at.y, (IMPERVIOUS,)):
            site.tree(at, (1.5, 3.6))


def industry(site: Site) -> None:
    """Halls on a paved yard with containers, lorries' lanes and stored goods."""
    rng, look, box = site.rng, site.look, site.box
    (du, dv), canvas = site.size, site.frame.canvas
    site.fill(IMPERVIOUS, look.yard.tinted(rng, 0.08, 0.02))
    for _ in range(rng.poisson(3.0)):
        objects.disc(canvas, site.spot(5.0), rng.uniform(4.0, 8.0), CLUTTER, look.soil, 0.3)
    split = float(rng.uniform(0.4, 0.6))
    halls = ((0.03, split - 0.07), (split + 0.07, 0.97)) if rng.random() < 0.6 else ((0.05, 0.72),)
    for low, high in halls:
        at = site.frame.place(box.u0 + 0.5 * (low + high) * du, box.v0 + rng.uniform(0.38, 0.5) * dv)
        size = (high - low) * du, float(rng.uniform(0.45, 0.65)) * dv
        site.building(at, size, rng.uniform(5.0, 10.0), flat=bool(rng.random() < 0.8))
    for _ in range(int(rng.integers(1, 6))):
        row = site.frame.place(box.u0 + rng.uniform(0.08, 0.92) * du, box.v1 - rng.uniform(4.0, 0.22 * dv + 4.0))
        objects.container(canvas, rng, row.moved(0.0, 0.0, float(rng.choice([0.0, np.pi / 2]))))
    if rng.random() < 0.6:
        _bays(site, site.frame.place(box.u0 + du / 2, box.v1 - 7.0), 0.8 * du)
    _street_trees(site, 1.0)


def park(site: Site) -> None:
    """Lawn and meadow under groups of trees, paths, perhaps a pond or a sand pit."""
    rng, look, canvas = site.rng, site.look, site.frame.canvas
    site.fill(LOW_VEGETATION, look.meadow if rng.random() < 0.5 else look.lawn)
    for _ in range(rng.poisson(2.0)):
        patch = look.lawn if rng.random() < 0.5 else look.meadow
        objects.disc(canvas, site.spot(6.0), rng.uniform(6.0, 14.0), LOW_VEGETATION, patch.tinted(rng, 0.1, 0.04))
    path = look.soil if rng.random() < 0.4 else look.pavement
    box, class_id = site.box, CLUTTER if path is look.soil else IMPERVIOUS
    u, v = box.u0 + rng.uniform(0.2, 0.8) * site.size[0], box.v0 + rng.uniform(0.2, 0.8) * site.size[1]
    site.frame.fill(replace(box, u0=u, u1=u + 2.4), class_id, path)
    site.frame.fill(replace(box, v0=v, v1=v + 2.4), class_id, path)
    if rng.random() < 0.7:
        objects.disc(canvas, site.spot(9.0), rng.uniform(6.0, 13.0), CLUTTER, look.water, 0.15)
    if rng.random() < 0.4:
        objects.disc(canvas, site.spot(6.0), rng.uniform(3.0, 5.0), CLUTTER, look.soil.tinted(rng, 0.1), 0.1)
    for _ in range(rng.poisson(7.0 * look.greenery)):
        heart = site.spot(5.0)
        for _ in range(int(rng.integers(4, 14))):
            near = heart.moved(rng.normal(0.0, 4.5), rng.normal(0.0, 4.5))
            if canvas.is_free(near.x, near.y, (LOW_VEGETATION,)):
                site.tree(near, (1.8, 5.0))
    site.trees(60.0, (1.8, 5.2))
    site.bushes(45.0)


def field(site: Site) -> None:
    """A crop in rows, rough grass or ploughed soil, with a tree line."""
    rng, look = site.rng, site.look
    kind = float(rng.random())
    if kind < 0.18:
        site.fill(CLUTTER, look.soil.tinted(rng, 0.1))
    else:
        site.fill(LOW_VEGETATION, look.meadow.tinted(rng, 0.12, 0.05))
    if kind > 0.55:
        du = site.size[0]
        crop = look.meadow.tinted(rng, 0.12, 0.06)
        for v in np.arange(site.box.v0 + 2.0, site.box.v1 - 2.0, float(rng.uniform(2.2, 3.4))).tolist():
            row = site.frame.place(site.box.u0 + du / 2, v)
            objects.hedge(site.frame.canvas, rng, row, du - 4.0, crop)
    site.bushes(25.0)
    site.trees(12.0 if kind > 0.18 else 3.0, (1.6, 4.5))


def parking(site: Site) -> None:
    """A car park: lanes with bays and a few trees."""
    du, rng, box = site.size[0], site.rng, site.box
    site.fill(LOW_VEGETATION, site.look.lawn)
    v = box.v0 + 6.0
    while v + 6.0 < box.v1:
        _bays(site, site.frame.place(box.u0 + du / 2, v), du - 3.0)
        v += 10.5 if rng.random() < 0.6 else 13.0
    for _ in range(rng.poisson(8.0 * site.look.greenery)):
        site.tree(site.spot(2.0), (1.4, 3.0))


def works(site: Site) -> None:
    """A building site: bare soil, heaps, containers, a shell of concrete."""
    rng, look, canvas = site.rng, site.look, site.frame.canvas
    site.fill(LOW_VEGETATION, look.meadow)
    du, dv = site.size
    at = site.frame.place(site.box.u0 + du / 2, site.box.v0 + dv / 2)
    objects.rectangle(canvas, at, 0.85 * du, 0.85 * dv, CLUTTER, look.soil)
    objects.rectangle(canvas, at, du + 4.0, 4.5, IMPERVIOUS, look.yard.tinted(rng, 0.1))
    site.building(at.moved(0.18 * du, 0.22 * dv), (0.35 * du, 0.25 * dv), rng.uniform(3.0, 9.0), flat=True)
    for _ in range(int(rng.integers(1, 5))):
        objects.container(canvas, rng, site.spot(5.0).moved(0.0, 0.0, float(rng.choice([0.0, np.pi / 2]))))
    for _ in range(rng.poisson(3.0)):
        objects.car(canvas, rng, site.spot(5.0))
    site.bushes(30.0)


BUILDERS: dict[str, Callable[[Site], None]] = {
    "houses": houses,
    "slabs": slabs,
    "court": court,
    "industry": industry,
    "park": park,
    "field": field,
    "parking": parking,
    "works": works,
}
