"""Scenes on disk: ``top_potsdam_R_C_RGB.tif`` and ``_label.tif``, georeferenced, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import RasterioIOError
from rasterio.io import MemoryFile

from shards.errors import InputError
from shards.synth.canvas import Canvas, Ids
from shards.synth.light import photograph
from shards.synth.look import Look
from shards.synth.town import build

GSD = 0.375  # metres a pixel, exact in binary, so that the edges of neighbours are equal numbers
CRS = "EPSG:32633"  # UTM zone 33 north, where Potsdam lies
ORIGIN = (366_000.0, 5_808_000.0)  # upper left corner of scene 1_1, easting and northing in metres
COLUMNS = 6  # scenes in one row of the grid
MINIMUM_SIZE = 64
MARGIN = 40  # pixels painted around a scene, so that shadows and crowns reach in from outside
GENERATOR = "1"  # raise it whenever the same seed would give other pixels
TAG = "DCTC_SYNTH"
# Position = class id: impervious surface, building, low vegetation, tree, car, clutter.
PALETTE = np.array(
    [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)], dtype=np.uint8
)


def render(seed: int, scene: int, size: int) -> tuple[Ids, Ids]:
    """The picture uint8 [size,size,3] and the class ids uint8 [size,size] of one scene.

    A pure function of its arguments, bit for bit on one machine (numpy's vector code and random streams may change
    with its version). Ids are rows of :data:`PALETTE`. One pixel is 0.375 m.

    Raises:
        InputError: when ``size`` < 64 or ``seed`` or ``scene`` is negative.
    """
    if scene < 0:
        raise InputError(f"scene is {scene}: scenes are counted from 0")
    _check(size, seed)
    look_rng, town_rng, camera_rng, canvas_rng = (
        np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence([seed, scene]).spawn(4)
    )
    look = Look.draw(look_rng)
    canvas = Canvas(canvas_rng, (size + 2 * MARGIN, size + 2 * MARGIN), GSD)
    build(canvas, look, town_rng)
    picture = photograph(canvas, look, camera_rng)
    middle = slice(MARGIN, MARGIN + size)
    return np.ascontiguousarray(picture[middle, middle]), np.ascontiguousarray(canvas.ids[middle, middle])


def scene_id(scene: int) -> str:
    """The id ``R_C`` of a scene: its row and column in a grid of six columns, counted from 1."""
    return f"{scene // COLUMNS + 1}_{scene % COLUMNS + 1}"


def write_scenes(
    out: Path, scenes: int = 12, size: int = 512, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write ``scenes`` labelled scenes of ``size`` x ``size`` pixels into the folder ``out``.

    Each is a pair of tiled deflate GeoTIFFs of uint8 [3,size,size]: the picture and the label in palette colours.
    The extents of neighbouring scenes touch. A scene depends on ``seed``, its number and ``size`` alone; writing
    into a folder of the same seed and size completes it.

    Args:
        progress: called as ``progress(done, scenes)`` after each scene.

    Returns:
        The paths of the pictures, in scene order.

    Raises:
        InputError: for scenes < 1, size < 64, seed < 0, a folder that cannot be written, or one that already has
            scenes of another origin, seed or size.
    """
    _check(size, seed)
    if scenes < 1:
        raise InputError(f"scenes is {scenes}: ask for at least 1")
    stamp = f"generator {GENERATOR}, seed {seed}, size {size}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(out, stamp)
        written = []
        for scene in range(scenes):
            written.append(_write_pair(out, scene, size, seed, stamp))
            if progress is not None:
                progress(scene + 1, scenes)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{out}: cannot write scenes there ({reason}); choose another folder") from error
    return written


def _check(size: int, seed: int) -> None:
    if size < MINIMUM_SIZE:
        raise InputError(f"size is {size} pixels: a scene needs at least {MINIMUM_SIZE}")
    if seed < 0:
        raise InputError(f"seed is {seed}: use 0 or a positive number")


def _refuse_strangers(out: Path, stamp: str) -> None:
    """Raise when the folder has scenes that this call would not have written."""
    for path in sorted(out.glob("top_potsdam_*.tif")):
        try:
            with rasterio.open(path) as source:
                found = source.tags().get(TAG)
        except RasterioIOError:
            found = None
        if found != stamp:
            what = f"made by another call ({found})" if found else "no scene of dctc synth"
            raise InputError(f"{path} is {what}, this one is ({stamp}): choose an empty folder for these scenes")


def _write_pair(out: Path, scene: int, size: int, seed: int, stamp: str) -> Path:
    picture, ids = render(seed, scene, size)
    name = f"top_potsdam_{scene_id(scene)}"
    # The label first: a label without its picture is an error to every reader, the reverse would pass as unlabelled.
    _write(out / f"{name}_label.tif", PALETTE[ids], scene, stamp)
    _write(out / f"{name}_RGB.tif", picture, scene, stamp)
    return out / f"{name}_RGB.tif"


def _write(path: Path, pixels: Ids, scene: int, stamp: str) -> None:
    """Write uint8 [H,W,3] as a GeoTIFF that appears under its name only when it is complete."""
    height, width, _ = pixels.shape
    west = ORIGIN[0] + (scene % COLUMNS) * width * GSD
    north = ORIGIN[1] - (scene // COLUMNS) * height * GSD
    profile = {
        "driver": "GTiff", "dtype": "uint8", "count": 3, "height": height, "width": width, "crs": CRS,
        "transform": rasterio.Affine(GSD, 0.0, west, 0.0, -GSD, north), "photometric": "RGB", "interleave": "pixel",
        "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate",
    }  # fmt: skip
    with MemoryFile() as memory:
        with memory.open(**profile) as target:
            target.write(np.moveaxis(pixels, -1, 0))
            target.update_tags(**{TAG: stamp})
        data = memory.read()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # another call may write the same scenes
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
