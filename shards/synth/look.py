"""How one scene looks: season, building stock, sun, sky and camera. All that differs from scene to scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.synth.canvas import Color, Floats, Material

# Reflectances of (lawn, rough meadow, one tree, another tree) at the height of each season.
SEASONS: tuple[tuple[Color, Color, Color, Color], ...] = (
    ((0.42, 0.54, 0.22), (0.48, 0.53, 0.28), (0.25, 0.37, 0.13), (0.32, 0.38, 0.18)),  # spring
    ((0.36, 0.50, 0.20), (0.43, 0.49, 0.25), (0.15, 0.27, 0.11), (0.21, 0.32, 0.14)),  # summer
    ((0.56, 0.52, 0.30), (0.60, 0.54, 0.34), (0.20, 0.27, 0.13), (0.26, 0.31, 0.16)),  # drought
    ((0.38, 0.47, 0.21), (0.50, 0.46, 0.28), (0.42, 0.25, 0.09), (0.36, 0.31, 0.11)),  # autumn
    ((0.39, 0.44, 0.25), (0.48, 0.45, 0.31), (0.27, 0.23, 0.18), (0.22, 0.21, 0.17)),  # winter
)
PITCHED: tuple[Material, ...] = (
    Material((0.62, 0.28, 0.19), 0.05, 0.05, 0.04, 0.02, stripe=0.05, period=0.8),  # red tiles
    Material((0.72, 0.41, 0.26), 0.05, 0.06, 0.05, 0.02, stripe=0.05, period=0.8),  # orange tiles
    Material((0.40, 0.29, 0.24), 0.05, 0.06, 0.05, 0.02, stripe=0.05, period=0.8),  # brown tiles
    Material((0.25, 0.27, 0.33), 0.03, 0.04, 0.03, 0.02, stripe=0.03, period=0.7),  # slate
    Material((0.55, 0.46, 0.40), 0.03, 0.05, 0.04, 0.02, stripe=0.03, period=1.1),  # fibre cement
    Material((0.46, 0.57, 0.70), 0.02, 0.02, 0.02, 0.02, stripe=0.06, period=1.2),  # blue sheet metal
    Material((0.38, 0.58, 0.49), 0.02, 0.04, 0.05, 0.02, stripe=0.05, period=1.2),  # copper
    Material((0.33, 0.34, 0.24), 0.06, 0.09, 0.08, 0.03, stripe=0.02, period=0.8),  # mossy tiles
)
FLAT: tuple[Material, ...] = (
    Material((0.66, 0.61, 0.52), 0.06, 0.04, 0.05, 0.03),  # gravel
    Material((0.74, 0.72, 0.68), 0.03, 0.03, 0.06, 0.04),  # concrete
    Material((0.21, 0.21, 0.22), 0.03, 0.04, 0.06, 0.03),  # bitumen
    Material((0.86, 0.86, 0.84), 0.02, 0.02, 0.04, 0.03),  # white membrane
    Material((0.38, 0.42, 0.24), 0.08, 0.10, 0.10, 0.05),  # planted
    Material((0.53, 0.40, 0.33), 0.04, 0.05, 0.06, 0.03),  # terracotta terrace
)
# How usual each material is: parameters of the Dirichlet distribution of a town's stock.
PITCHED_USUAL = np.array([1.2, 0.9, 0.6, 0.25, 0.3, 0.3, 0.2, 0.15])
FLAT_USUAL = np.array([0.6, 0.5, 0.4, 0.6, 0.25, 0.5])
DISTRICTS = ("houses", "slabs", "court", "industry", "park", "field", "parking", "works")
TYPICAL = np.array([3.2, 1.3, 1.7, 1.1, 1.1, 0.6, 0.4, 0.4])


@dataclass(frozen=True)
class Look:
    """The conditions of one scene. Angles are radians, lengths metres, blur pixels; colours are relative to 1."""

    lawn: Material
    meadow: Material
    trees: tuple[Material, ...]
    soil: Material
    water: Material
    road: Material
    pavement: Material
    yard: Material
    pitched: tuple[float, ...]  # how common each material of PITCHED is
    flat: tuple[float, ...]
    flat_share: float
    districts: tuple[float, ...]  # how common each of DISTRICTS is
    traffic: float  # part of the parking places taken
    greenery: float  # how densely trees stand, about 1
    markings: float  # brightness of the lines on the road; 0 = worn off
    sun_azimuth: float
    sun_elevation: float
    sun: Floats  # [3]
    sky: Floats
    haze: float
    haze_color: Floats
    clouds: float
    gain: Floats  # white balance and exposure
    gamma: float
    blur: float
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Look:
        """Draw the conditions of one scene."""
        ground = _greens(rng) | _grounds(rng)
        stock = {
            "pitched": tuple(rng.dirichlet(PITCHED_USUAL).tolist()),
            "flat": tuple(rng.dirichlet(FLAT_USUAL).tolist()),
            "flat_share": float(rng.uniform(0.08, 0.4)),
            "districts": tuple((rng.dirichlet(TYPICAL * 0.9) * 0.75 + 0.25 * TYPICAL / TYPICAL.sum()).tolist()),
            "traffic": float(rng.uniform(0.35, 0.9)),
            "greenery": float(rng.uniform(0.5, 1.6)),
            "markings": float(rng.choice([0.0, rng.uniform(0.6, 0.85)])),
        }
        return cls(**ground, **stock, **_light(rng))  # type: ignore[arg-type]  # values of several types


def _varied(rng: np.random.Generator, color: npt.NDArray[np.float64], value: float, hue: float) -> Color:
    gain = (1.0 + rng.normal(0.0, value)) * (1.0 + rng.normal(0.0, hue, 3))
    red, green, blue = np.clip(color * gain, 0.03, 0.9).tolist()
    return red, green, blue


def _greens(rng: np.random.Generator) -> dict[str, object]:
    weights = rng.dirichlet(np.full(len(SEASONS), 0.35))
    lawn, meadow, one, other = np.tensordot(weights, np.asarray(SEASONS), axes=1)
    rough = float(rng.uniform(0.5, 1.5))
    trees = []
    for base in (one, other, 0.5 * (one + other), 0.6 * one + 0.1):
        color = _varied(rng, base, 0.10, 0.04)
        trees.append(Material(color, 0.10 * rough, 0.10 * rough, 0.06, 0.03, relief=float(rng.uniform(1.0, 1.6))))
    # A rough meadow has the bumps of a crown, a lawn may be darker than one: colour or texture alone do not decide.
    return {
        "lawn": Material(_varied(rng, lawn, 0.10, 0.04), 0.04 * rough, 0.04 * rough, 0.05, 0.04, relief=0.05),
        "meadow": Material(
            _varied(rng, meadow, 0.10, 0.04), 0.08 * rough, 0.08 * rough, 0.10, 0.07, float(rng.uniform(0.1, 0.35))
        ),
        "trees": tuple(trees),
    }


def _grounds(rng: np.random.Generator) -> dict[str, object]:
    soil = rng.uniform(0.0, 1.0)
    sand = np.array([0.66, 0.50, 0.22]) * (1 - soil) + np.array([0.84, 0.72, 0.46]) * soil
    water = np.array([0.08, 0.26, 0.38]) * rng.uniform(0.8, 1.5)
    level = rng.uniform(0.28, 0.5)
    asphalt = np.full(3, level) + np.array([0.02, 0.0, -0.02]) * rng.uniform(-0.6, 1.4)
    slabs = np.full(3, np.clip(level + rng.uniform(-0.04, 0.16), 0.3, 0.62))
    slabs = slabs + np.array([0.03, 0.0, -0.03]) * rng.uniform(-0.3, 1.8)
    yard = 0.5 * (asphalt + slabs) + np.array([0.05, 0.01, -0.03]) * rng.uniform(0.0, 1.0)
    return {
        "soil": Material(_varied(rng, sand, 0.1, 0.04), 0.08, 0.10, 0.12, 0.08, relief=0.15),
        "water": Material(_varied(rng, water, 0.05, 0.08), 0.01, 0.02, 0.02, 0.05),
        "road": Material(_varied(rng, asphalt, 0.02, 0.01), 0.03, 0.03, 0.05, 0.04),
        "pavement": Material(_varied(rng, slabs, 0.02, 0.01), 0.05, 0.04, 0.04, 0.03, stripe=0.04, period=1.0),
        "yard": Material(_varied(rng, yard, 0.05, 0.02), 0.05, 0.05, 0.07, 0.05),
    }


def _light(rng: np.random.Generator) -> dict[str, object]:
    elevation = float(np.deg2rad(rng.uniform(34.0, 62.0)))
    direct = rng.uniform(0.65, 1.0)  # the rest is the sky's: a veiled sun casts weak shadows
    low = 1.0 - elevation / np.deg2rad(62.0)
    sun = direct * np.array([1.0, 1.0 - 0.10 * low, 1.0 - 0.24 * low]) / np.sin(max(elevation, 0.6))
    blue = 1.0 + rng.uniform(0.0, 1.0) * np.array([-0.12, 0.0, 0.22])
    sky = (0.46 + 0.5 * (1.0 - direct)) * blue
    return {
        "sun_azimuth": float(rng.uniform(0.0, 2.0 * np.pi)),
        "sun_elevation": elevation,
        "sun": sun.astype(np.float32),
        "sky": sky.astype(np.float32),
        "haze": float(rng.beta(1.2, 5.0) * 0.4),
        "haze_color": np.array([0.66, 0.70, 0.76], dtype=np.float32),
        "clouds": float(rng.choice([0.0, rng.uniform(0.1, 0.3)])),
        "gain": (rng.uniform(0.95, 1.2) * (1.0 + rng.normal(0.0, 0.03, 3))).astype(np.float32),
        "gamma": float(rng.uniform(0.85, 1.15)),
        "blur": float(rng.uniform(0.35, 0.85)),
        "noise": float(rng.uniform(0.003, 0.014)),
    }
