"""Find, pair and check the rasters of a dataset."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine

from shards.codec import DTYPES
from shards.errors import InputError
from shards.recipe import Recipe

Dtype = Literal["uint8", "uint16", "int16", "float32"]

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_ID = 64  # keys are names in USTAR archives: 100 bytes with offsets and suffix


@dataclass(frozen=True)
class Scene:
    """An image and, when it is labelled, its label; paths are POSIX paths relative to the root."""

    id: str
    image: str
    label: str | None

    @property
    def files(self) -> list[str]:
        """The image, then the label if there is one."""
        return [self.image] if self.label is None else [self.image, self.label]


@contextmanager
def open_raster(path: Path) -> Iterator[DatasetReader]:
    """Open a raster.

    Raises:
        InputError: when it cannot be opened; names the file.
    """
    with naming(path):
        source = rasterio.open(path)
    with source:
        yield source


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn a failure to read inside the block into an InputError that names the file."""
    try:
        yield
    except RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: cannot be read, is it damaged or cut short? Replace the file ({reason})") from None


def band_count(source: DatasetReader) -> int:
    """Bands of a raster, where a colour table counts as the three bands that it expands to."""
    return 3 if has_palette(source) else source.count


def has_palette(source: DatasetReader) -> bool:
    """Whether the raster's one band holds places in a colour table."""
    return bool(source.count == 1 and source.colorinterp[0] == ColorInterp.palette)


def find_scenes(recipe: Recipe, root: Path) -> list[Scene]:
    """All scenes below ``root``, sorted by id.

    A file that matches a label pattern is a label, whatever else it matches.

    Raises:
        InputError: when the folder is missing or holds no image of the pattern, two files claim one scene, or a
            label has no image.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder of scenes; give the right one with --root")
    files = sorted(_walk(root))
    labels = _claim(files, recipe.label.pattern if recipe.label else [], recipe.scene_id, "labels")
    taken = set(labels.values())
    images = _claim([f for f in files if f not in taken], recipe.image.pattern, recipe.scene_id, "images")
    if not images:
        seen = f"it holds e.g. {files[0]}" if files else "it holds no files"
        raise InputError(f"{root}: no file matches the image pattern {recipe.image.pattern[0]!r}; {seen}")
    orphans = sorted(labels.keys() - images.keys())
    if orphans:
        more = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 else ""
        raise InputError(
            f"{root / labels[orphans[0]]}: label of scene {orphans[0]!r} without its image{more}; "
            "add the image, remove the label or correct the patterns"
        )
    return [Scene(scene, image, labels.get(scene)) for scene, image in sorted(images.items())]


def input_files(root: Path, scene: Scene) -> list[str]:
    """All files that a scene is read from, world files and other sidecars included, relative to the root.

    Raises:
        InputError: when its image or label cannot be opened.
    """
    files: list[str] = []
    for path in scene.files:
        with open_raster(root / path) as source:
            files += [path, *sorted(Path(os.path.relpath(file, root)).as_posix() for file in source.files)]
    return list(dict.fromkeys(files))


def _walk(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _claim(files: Sequence[str], patterns: Sequence[str], template: str | None, what: str) -> dict[str, str]:
    """Scene id -> file for the files that match one of the patterns."""
    compiled = [re.compile(pattern) for pattern in patterns]
    found: dict[str, str] = {}
    for file in files:
        match = next((m for m in (pattern.fullmatch(file) for pattern in compiled) if m), None)
        if match is None:
            continue
        scene = _scene_id(match, template)
        if scene in found:
            raise InputError(f"scene {scene!r} has two {what}, {found[scene]} and {file}: make the pattern more exact")
        found[scene] = file
    return found


def _scene_id(match: re.Match[str], template: str | None) -> str:
    groups = {name: text or "" for name, text in match.groupdict().items()}
    if template is None:
        raw = "_".join(groups.values())
    else:
        try:
            raw = template.format(**groups)
        except (KeyError, IndexError, ValueError):
            known = ", ".join(groups)
            raise InputError(f"scene_id {template!r} does not fit the named groups of the pattern: {known}") from None
    scene = _UNSAFE.sub("-", raw)
    if not 0 < len(scene) <= _LONGEST_ID:
        raise InputError(f"{match.string}: scene id {scene!r} must have 1 to {_LONGEST_ID} characters: set scene_id")
    return scene


def check_scenes(recipe: Recipe, root: Path, scenes: Sequence[Scene]) -> Dtype:
    """Look at the headers of all scenes before any work is done; the dtype that all images share.

    Raises:
        InputError: when a file cannot be opened, bands are missing, images disagree in band count or dtype, or a
            label does not lie on its image's grid.
    """
    first: tuple[str, int, Dtype] | None = None
    for scene in scenes:
        with open_raster(root / scene.image) as image:
            agreed = _check_bands(recipe, root / scene.image, image)
            if first is not None and agreed != first[1:]:
                raise InputError(
                    f"{root / scene.image}: {agreed[0]} bands of {agreed[1]}, but {first[0]} has {first[1]} of "
                    f"{first[2]}: the images of one dataset must agree"
                )
            first = first or (scene.image, *agreed)
            if scene.label is not None:
                with open_raster(root / scene.label) as label:
                    _check_label(recipe, root / scene.label, image, label)
    if first is None:
        raise InputError(f"{root}: no scenes")
    return first[2]


def _check_bands(recipe: Recipe, path: Path, image: DatasetReader) -> tuple[int, Dtype]:
    count = band_count(image)
    needed = max([*recipe.bands.indexes, recipe.nodata.alpha or 0])
    if needed > count:
        raise InputError(
            f"{path}: has {count} bands, but the recipe wants band {needed}: correct bands or nodata.alpha"
        )
    dtypes = {image.dtypes[0 if has_palette(image) else index - 1] for index in recipe.bands.indexes}
    dtype = dtypes.pop()
    if dtypes or dtype not in DTYPES:
        raise InputError(f"{path}: bands of {dtype} are not supported: convert them to one of {', '.join(DTYPES)}")
    return count, cast(Dtype, dtype)


def _check_label(recipe: Recipe, path: Path, image: DatasetReader, label: DatasetReader) -> None:
    if label.shape != image.shape:
        raise InputError(
            f"{path}: label of {label.width} x {label.height} pixels, but its image {image.name} has "
            f"{image.width} x {image.height}: they must lie on one grid"
        )
    if band_count(label) < 3 or label.dtypes[0] != "uint8":
        raise InputError(f"{path}: label kind palette needs 8-bit RGB, RGBA or a colour table, not this raster")
    if recipe.label is not None and recipe.label.check_grid:
        shift = _grid_shift(image, label)
        if shift > 0.5 or (image.crs and label.crs and image.crs != label.crs):
            raise InputError(
                f"{path}: its georeference disagrees with that of {image.name} (by {shift:.2f} pixels, or another "
                "CRS): reproject the label, or set label.check_grid: false if only the tags are wrong"
            )


def _grid_shift(image: DatasetReader, label: DatasetReader) -> float:
    """Pixels by which the corners of two georeferenced rasters of one size lie apart; 0 if one has no georeference."""
    if image.transform.is_identity or label.transform.is_identity:
        return 0.0
    corners = [(0, 0), (image.width, 0), (0, image.height), (image.width, image.height)]
    apart = max(math.dist(place_of(image.transform, *c), place_of(label.transform, *c)) for c in corners)
    return apart / math.sqrt(abs(image.transform.determinant))


def place_of(transform: Affine, col: float, row: float) -> tuple[float, float]:
    """Coordinates of the upper left corner of a pixel."""
    return (
        transform.a * col + transform.b * row + transform.c,
        transform.d * col + transform.e * row + transform.f,
    )
