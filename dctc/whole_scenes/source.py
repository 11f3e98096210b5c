"""A scene read by its recipe's rules, as packing reads it, for prediction as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dctc.mapping.scene import georeferencing, quiet_open
from shards.errors import InputError
from shards.reading import SceneReader, open_scene
from shards.recipe import Recipe
from shards.scenes import Scene

STRIP = 512  # rows read at once for a picture


@dataclass(frozen=True)
class RecipeSource:
    """What ``predict_scene`` reads in place of the file: stacks, colour tables, ``nodata``, masks as in training.

    Attributes:
        path: the scene's first image, which names it and has its grid.
        dtype: numpy name of the pixels that the model was trained on.
        place: keywords that place a new file on the scene's grid.
    """

    path: Path
    reader: SceneReader
    dtype: str
    place: dict[str, Any]

    @property
    def height(self) -> int:
        """Rows."""
        return self.reader.grid.height

    @property
    def width(self) -> int:
        """Pixels in a row."""
        return self.reader.grid.width

    def georeferencing(self) -> dict[str, Any]:
        """As of the scene's first image."""
        return self.place

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Rows ``start`` to ``stop``: values [bands, rows, width] and which pixels have data, bool [rows, width].

        Raises:
            InputError: a damaged file, or pixels of another type than the model's.
        """
        values, valid = self.reader.rows(start, stop)
        if values.dtype.name != self.dtype:
            raise InputError(
                f"{self.path}: its pixels are {values.dtype.name} by now, the dataset's are {self.dtype}; give --root "
                "the scenes that were packed"
            )
        return values, valid

    def thinned(self, rows: NDArray[np.int64], columns: NDArray[np.int64], bands: int) -> NDArray[Any]:
        """The first ``bands`` bands [bands, len(rows), len(columns)] at these rows, ascending, and columns."""
        parts = []
        for top in range(0, self.height, STRIP):
            inside = rows[(rows >= top) & (rows < top + STRIP)] - top
            if len(inside):
                values = self.read(top, min(self.height, top + STRIP))[0][:bands]
                parts.append(values[:, inside][:, :, columns])
        return np.concatenate(parts, axis=1)


@contextmanager
def open_source(recipe: Recipe, root: Path, scene: Scene, dtype: str) -> Iterator[RecipeSource]:
    """Open all files of a scene; ``dtype`` is the numpy name of the dataset's pixels.

    Raises:
        InputError: a file that cannot be opened or does not lie on the image's grid.
    """
    path = root / scene.image
    with open_scene(recipe, root, scene) as reader:
        with quiet_open(path) as file:
            place = georeferencing(file)
        yield RecipeSource(path, reader, dtype, place)
