"""Sun, sky, haze and sensor: from the layers of a canvas to a picture of 8-bit pixels."""

from __future__ import annotations

import numpy as np

from shards.synth.canvas import Bools, Canvas, Floats, Ids, value_noise
from shards.synth.look import Look


def photograph(canvas: Canvas, look: Look, rng: np.random.Generator) -> Ids:
    """The picture uint8 [H,W,3] of a canvas under the light and through the camera of ``look``."""
    scene = canvas.color * _illumination(canvas, look, rng)
    scene = scene * (1.0 - look.haze) + look.haze_color * np.float32(look.haze)
    seen = np.power(np.clip(scene * look.gain, 0.0, 1.0), np.float32(look.gamma))
    seen = _blur(seen, look.blur)
    # Shot noise grows with the signal; sensors of neighbouring bands share a part of it.
    shared = rng.standard_normal((*canvas.shape, 1), dtype=np.float32)
    own = rng.standard_normal((*canvas.shape, 3), dtype=np.float32)
    seen = seen + np.float32(look.noise) * (0.5 + np.sqrt(seen)) * (0.6 * shared + 0.8 * own)
    return np.rint(np.clip(seen, 0.0, 1.0) * 255.0).astype(np.uint8)


def _illumination(canvas: Canvas, look: Look, rng: np.random.Generator) -> Floats:
    """Light on every surface, float32 [H,W,3]: Lambert's cosine for the sun where it reaches, plus the sky."""
    east, south = np.cos(look.sun_azimuth), np.sin(look.sun_azimuth)
    flat, up = np.cos(look.sun_elevation), np.sin(look.sun_elevation)
    right, down = canvas.slope
    cosine = (up - flat * (east * right + south * down)) / np.sqrt(1.0 + right * right + down * down)
    reached = _blur(1.0 - _shadow(canvas, look).astype(np.float32), 0.6)
    if look.clouds:
        veil = value_noise(rng, canvas.shape, 45.0 / canvas.gsd)
        reached = reached * (1.0 - np.float32(look.clouds) * np.clip(0.5 + 0.7 * veil, 0.0, 1.0))
    lit = np.maximum(cosine, 0.0) * reached
    return np.asarray(lit[..., None] * look.sun + look.sky, dtype=np.float32)


def _shadow(canvas: Canvas, look: Look) -> Bools:
    """Pixels from which something towards the sun stands above the line of sight, bool [H,W]."""
    height = canvas.height
    rise = float(np.tan(look.sun_elevation)) * canvas.gsd
    dark = np.zeros(canvas.shape, dtype=np.bool_)
    rows, cols = canvas.shape
    for step in range(1, int(float(height.max()) / rise) + 1):
        dx = int(np.rint(step * np.cos(look.sun_azimuth)))
        dy = int(np.rint(step * np.sin(look.sun_azimuth)))
        if abs(dx) >= cols or abs(dy) >= rows:
            break
        here = (slice(max(-dy, 0), rows - max(dy, 0)), slice(max(-dx, 0), cols - max(dx, 0)))
        there = (slice(max(dy, 0), rows - max(-dy, 0)), slice(max(dx, 0), cols - max(-dx, 0)))
        dark[here] |= height[there] > height[here] + np.float32(step * rise)
    return dark


def _blur(field: Floats, sigma: float) -> Floats:
    """Gaussian blur of the first two axes, edges repeated."""
    radius = max(1, int(np.ceil(2.5 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        width = [(0, 0)] * field.ndim
        width[axis] = (radius, radius)
        padded = np.pad(field, width, mode="edge")
        size = field.shape[axis]
        total = np.zeros_like(field)
        for tap, weight in enumerate(kernel):
            part = [slice(None)] * field.ndim
            part[axis] = slice(tap, tap + size)
            total += weight * padded[tuple(part)]
        field = total
    return field
