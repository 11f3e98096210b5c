"""Read one scene from top to bottom: pixels, their validity, and why a pixel carries no class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.grids import Grid, OnGrid, on_grid
from shards.headers import needs_warping
from shards.images import ImageReader, open_image
from shards.inputs import Ids, Mask, Palette, Vector
from shards.labels import IMAGE_NODATA, MASKED, PADDING, IdsDecoder, PaletteDecoder, ids_nodata
from shards.rasters import open_raster, tagged_nodata
from shards.recipe import Recipe
from shards.rows import Rows
from shards.scenes import Scene
from shards.tiling import Window, windows
from shards.vectors import VectorLabel

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tile:
    """One window of a scene."""

    window: Window
    image: Array  # [C,S,S]
    valid: npt.NDArray[np.bool_]  # [S,S]
    codes: npt.NDArray[np.uint8] | None  # [S,S], class ids and reason codes; None in a scene without a label


@dataclass(frozen=True)
class LabelCount:
    """What a scene's label held, pixels or features of a vector file; ``values`` are its most frequent unknown ones."""

    counted: Literal["pixels", "features"]
    total: int
    unmatched: int
    values: list[tuple[str, int]]


class _Unmatched(Protocol):
    @property
    def unmatched(self) -> int: ...

    def unknown_values(self, most: int = 5) -> list[tuple[str, int]]: ...


@dataclass(frozen=True)
class _Label:
    load: Callable[[int, int], Array]  # rows of class ids and reason codes
    block_height: int
    counts: Callable[[], LabelCount]


@contextmanager
def open_scene(recipe: Recipe, root: Path, scene: Scene) -> Iterator[SceneReader]:
    """Open all files of a scene."""
    with ExitStack() as stack:
        image = stack.enter_context(open_image(recipe, root, scene))
        label = stack.enter_context(_open_label(recipe, root, scene, image.grid))
        reader = SceneReader(recipe, scene, image, label)
        if scene.mask is not None and recipe.mask is not None and (label or recipe.mask.applies_to == "image"):
            file = stack.enter_context(open_raster(root / scene.mask))
            mask = stack.enter_context(on_grid(file, image.grid, None))
            reader.mask_with(mask, recipe.mask)
        yield reader


@contextmanager
def _open_label(recipe: Recipe, root: Path, scene: Scene, grid: Grid) -> Iterator[_Label | None]:
    """The label of a scene; None where it has none or where no feature touches it."""
    label = recipe.label
    if scene.label is None or label is None:
        yield None
        return
    path = root / scene.label
    if isinstance(label, Vector):
        features = VectorLabel(path, label, recipe.classes, grid)
        if features.touches or label.background is not None:
            total = features.total
            yield _Label(features.rows, features.block_height, lambda: _count("features", total, features))
        else:
            yield None
        return
    with ExitStack() as stack:
        source = stack.enter_context(open_raster(path))
        resampling = label.resampling if needs_warping(label, grid, Grid.of(source)) else None
        tagged = tagged_nodata(source, 1)
        nodata = ids_nodata(label, tagged) if isinstance(label, Ids) else None
        placed = stack.enter_context(on_grid(source, grid, resampling, nodata))
        if isinstance(label, Palette):
            colors = PaletteDecoder(label, recipe.classes)
            yield _Label(
                lambda start, stop: colors.decode(placed.colors(start, stop), placed.masked(start, stop), tagged),
                placed.block_height,
                lambda: _count("pixels", colors.pixels, colors),
            )
        else:
            numbers = IdsDecoder(label, recipe.classes, tagged)
            yield _Label(
                lambda start, stop: numbers.decode(placed.read([1], start, stop)[0], placed.masked(start, stop)),
                placed.block_height,
                lambda: _count("pixels", numbers.pixels, numbers),
            )


def _count(counted: Literal["pixels", "features"], total: int, decoder: _Unmatched) -> LabelCount:
    return LabelCount(counted, total, decoder.unmatched, decoder.unknown_values())


class SceneReader:
    """The tiles of one scene; each block of its files is decoded once where it can be."""

    def __init__(self, recipe: Recipe, scene: Scene, image: ImageReader, label: _Label | None) -> None:
        self._recipe, self._scene, self._label = recipe, scene, label
        self.grid = image.grid
        self.empty = 0  # windows without a valid pixel so far
        self.crs_wkt = self.grid.crs.to_wkt() if self.grid.crs else None
        self._image = image
        self._pixels = self._rows(image.rows, image.block_height)
        self._codes = self._rows(label.load, label.block_height) if label else None
        self._mask: Rows | None = None
        self._masked: Callable[[int, int], Array] | None = None

    @property
    def labelled(self) -> bool:
        """Whether the scene has a label."""
        return self._label is not None

    def mask_with(self, file: OnGrid, rules: Mask) -> None:
        """Set aside the pixels that a mask file says."""

        def ignored(start: int, stop: int) -> Array:
            zero: Array = file.read([1], start, stop)[0] == 0
            return zero if rules.ignore == "zero" else ~zero

        self._masked = ignored
        self._mask = self._rows(ignored, file.block_height)

    def rows(self, start: int, stop: int) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Whole rows as they stand in tiles: image [C,rows,width], 0 where not valid, and validity bool [rows,width].

        Rows may be asked for in any order, beside :meth:`tiles`; nothing is kept.
        """
        pixels = self._image.rows(start, stop)
        image, valid = pixels[:-1], pixels[-1] > 0
        if self._masked is not None and self._recipe.mask is not None and self._recipe.mask.applies_to == "image":
            valid &= ~self._masked(start, stop)
            image[:, ~valid] = 0
        return image, valid

    def _rows(self, load: Callable[[int, int], Array], block: int) -> Rows:
        return Rows(load, self.grid.height, block, self._recipe.tile.size)

    def tiles(self) -> Iterator[Tile]:
        """Tiles with at least one valid pixel, in row-major order."""
        tile = self._recipe.tile
        for window in windows(self.grid.height, self.grid.width, tile.size, tile.step, tile.edge):
            read = self._tile(window)
            if read.valid.any():
                yield read
            else:
                self.empty += 1

    def _tile(self, window: Window) -> Tile:
        pixels = self._pixels.cut(window, 0)
        image, valid = pixels[:-1], pixels[-1] > 0
        codes = self._codes.cut(window, PADDING) if self._codes is not None else None
        missing = ~valid
        if self._mask is not None and self._recipe.mask is not None:
            masked = self._mask.cut(window, 0)
            if codes is not None:
                codes[masked] = MASKED
            if self._recipe.mask.applies_to == "image":
                valid &= ~masked
                image[:, masked] = 0
        if codes is not None and missing.any():
            codes[missing & (codes != PADDING)] = IMAGE_NODATA
        return Tile(window, image, valid, codes)

    def counts(self) -> LabelCount | None:
        """What the label held in the rows read so far."""
        return self._label.counts() if self._label else None

    def check_unmatched(self, root: Path) -> None:
        """Raise when the share of unknown values is above what the recipe tolerates."""
        label, counts = self._recipe.label, self.counts()
        if label is None or counts is None or counts.unmatched <= label.max_unmatched_share * counts.total:
            return
        unit = "px" if counts.counted == "pixels" else "features"
        worst = "; ".join(f"{value} ({count} {unit})" for value, count in counts.values)
        what, mend = _WORDS[label.kind]
        raise InputError(
            f"{root / str(self._scene.label)}: {counts.unmatched / counts.total:.2%} of {what} that the recipe does "
            f"not know, more than label.max_unmatched_share {label.max_unmatched_share:.2%} (scene "
            f"{self._scene.id}); most frequent: {worst}. Correct {mend}"
        )


_WORDS = {
    "palette": ("the label pixels have colours", "classes, label.ignore_colors or label.tolerance"),
    "ids": ("the label pixels have numbers", "label.map (unwanted numbers: ignore) or classes"),
    "vector": ("the features have values", "label.map (unwanted values: ignore) or classes"),
}
