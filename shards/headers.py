"""Look at the headers of all files before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np
from rasterio.io import DatasetReader

from shards.codec import DTYPES
from shards.errors import InputError
from shards.grids import Grid
from shards.inputs import Ids, Palette, Vector
from shards.rasters import band_count, has_palette, open_raster
from shards.recipe import Recipe
from shards.scenes import Dtype, Scene
from shards.vectors import check_vector


def check_scenes(recipe: Recipe, root: Path, scenes: Sequence[Scene]) -> Dtype:
    """Look at the headers of all scenes; the dtype that all images share.

    Raises:
        InputError: when a file cannot be opened, bands are missing, images disagree in band count or dtype, files of
            a stack, a label or a mask do not lie on their image's grid, or a vector file lacks what the recipe names.
    """
    first: tuple[str, int, Dtype] | None = None
    checked: dict[tuple[str, str | None], None] = {}
    for scene in scenes:
        with ExitStack() as stack:
            images = [stack.enter_context(open_raster(root / path)) for path in scene.images]
            agreed = _check_bands(recipe, root, scene, images)
            if first is not None and agreed != first[1:]:
                raise InputError(
                    f"{root / scene.image}: {agreed[0]} bands of {agreed[1]}, but {first[0]} has {first[1]} of "
                    f"{first[2]}: the images of one dataset must agree"
                )
            first = first or (scene.image, *agreed)
            grid = Grid.of(images[0])
            _check_label(recipe, root, scene, grid, checked)
            if scene.mask is not None:
                with open_raster(root / scene.mask) as mask:
                    _check_mask(root / scene.mask, grid, mask)
    if first is None:
        raise InputError(f"{root}: no scenes")
    return first[2]


def common_dtype(dtypes: Sequence[str]) -> str:
    """The smallest of uint8, uint16, int16 and float32 that holds all values of all of these dtypes exactly.

    What is none of these four comes back as it is.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            return dtype
    for dtype in ("uint8", "uint16", "int16"):
        if all(np.can_cast(np.dtype(given), np.dtype(dtype), "safe") for given in dtypes):
            return dtype
    return "float32"


def _check_bands(recipe: Recipe, root: Path, scene: Scene, images: Sequence[DatasetReader]) -> tuple[int, Dtype]:
    path = root / scene.image
    if len(images) > 1 or recipe.image.files:
        _check_stack(recipe, root, scene, images)
    count = len(images) if len(images) > 1 else band_count(images[0])
    needed = max([*recipe.bands.indexes, recipe.nodata.alpha or 0])
    if needed > count:
        raise InputError(
            f"{path}: has {count} bands, but the recipe wants band {needed}: correct bands or nodata.alpha"
        )
    if len(images) > 1:
        dtypes = [images[index - 1].dtypes[0] for index in recipe.bands.indexes]
    else:
        dtypes = [images[0].dtypes[0 if has_palette(images[0]) else index - 1] for index in recipe.bands.indexes]
    dtype = common_dtype(dtypes)
    if dtype not in DTYPES:
        raise InputError(f"{path}: bands of {dtype} are not supported: convert them to one of {', '.join(DTYPES)}")
    return count, cast(Dtype, dtype)


def _check_stack(recipe: Recipe, root: Path, scene: Scene, images: Sequence[DatasetReader]) -> None:
    grid = Grid.of(images[0])
    for path, image in zip(scene.images, images, strict=True):
        if len(images) > 1 and (image.count > 1 or has_palette(image)):
            raise InputError(
                f"{root / path}: has {band_count(image)} bands, but image.files stacks files of one band each"
            )
        if grid.same_as(Grid.of(image)):
            continue
        if recipe.image.resampling is None:
            raise InputError(
                f"{root / path}: {image.width} x {image.height} pixels that do not lie on the grid of {scene.image} "
                f"({grid.width} x {grid.height}): name an image.resampling, or bring them onto one grid"
            )
        grid.check_can_take(root / path, Grid.of(image))


def _check_label(
    recipe: Recipe, root: Path, scene: Scene, grid: Grid, checked: dict[tuple[str, str | None], None]
) -> None:
    if scene.label is None or recipe.label is None:
        return
    path = root / scene.label
    if isinstance(recipe.label, Vector):
        crs = grid.crs.to_wkt() if grid.crs else None
        if (scene.label, crs) not in checked:  # one file may be the label of all scenes
            check_vector(path, recipe.label, scene.image, crs)
            checked[scene.label, crs] = None
        return
    with open_raster(path) as label:
        _check_pixels_of_label(recipe.label, path, label)
        if not needs_warping(recipe.label, grid, Grid.of(label)):
            return
        if recipe.label.resampling is not None:
            grid.check_can_take(path, Grid.of(label))
            return
        _refuse_grid(path, scene.image, grid, Grid.of(label))


def needs_warping(label: Palette | Ids, grid: Grid, its: Grid) -> bool:
    """Whether a label lies on another grid than its image; with ``check_grid: false`` equal sizes are enough."""
    if not label.check_grid and (grid.height, grid.width) == (its.height, its.width):
        return False
    return not grid.same_as(its)


def _check_pixels_of_label(label: Palette | Ids, path: Path, source: DatasetReader) -> None:
    if isinstance(label, Palette) and (band_count(source) < 3 or source.dtypes[0] != "uint8"):
        raise InputError(
            f"{path}: label kind palette needs 8-bit RGB, RGBA or a colour table, not this raster; pixels that hold "
            "numbers of classes are of label kind ids"
        )
    if isinstance(label, Ids) and (source.count != 1 or source.dtypes[0].startswith("complex")):
        raise InputError(
            f"{path}: label kind ids needs one band of numbers, not {source.count} of {source.dtypes[0]}; colours are "
            "of label kind palette"
        )


def _refuse_grid(path: Path, image: str, grid: Grid, its: Grid) -> None:
    if (grid.height, grid.width) != (its.height, its.width):
        raise InputError(
            f"{path}: label of {its.width} x {its.height} pixels, but its image {image} has "
            f"{grid.width} x {grid.height}: they must lie on one grid, or name a label.resampling"
        )
    raise InputError(
        f"{path}: its georeference disagrees with that of {image} (by {grid.shift(its):.2f} pixels): reproject the "
        "label, name a label.resampling, or set label.check_grid: false if only the tags are wrong"
    )


def _check_mask(path: Path, grid: Grid, mask: DatasetReader) -> None:
    if mask.count != 1:
        raise InputError(f"{path}: a mask needs one band, not {mask.count}")
    if not grid.same_as(Grid.of(mask)):
        raise InputError(
            f"{path}: mask of {mask.width} x {mask.height} pixels that do not lie on the grid of its image "
            f"({grid.width} x {grid.height}): bring it onto that grid"
        )
