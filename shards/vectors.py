"""Features of vector files -> class ids, drawn row block by row block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio.features
from rasterio.crs import CRS
from rasterio.transform import Affine

from shards.errors import InputError
from shards.grids import Grid
from shards.inputs import IGNORE_WORD, Vector, value_text
from shards.labels import IGNORE_VALUE, UNLABELLED, UNMATCHED
from shards.sections import ClassColor

# Places of vertices are rounded to this part of a pixel, more than doubles err for 5 cm pixels in UTM. So a vertex on
# the border of two pixels lies exactly there, and the same pixels are hit from whatever row the drawing starts.
_STEP = 2.0**-22

_BLOCK = 2**25  # pixels drawn at once: 32 MiB; each block takes all features that reach it into GDAL's form again

Array = npt.NDArray[Any]


def _import() -> tuple[Any, Any, Any]:
    try:
        import pyogrio
        import pyproj
        import shapely
    except ImportError as error:
        raise InputError(
            f"label kind vector needs the extra vector, which is not installed ({error.name} is missing): "
            "pip install dctc[vector]"
        ) from None
    return pyogrio, pyproj, shapely


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    pyogrio, pyproj, shapely = _import()
    failures = (
        pyogrio.errors.DataSourceError,
        pyogrio.errors.DataLayerError,
        pyogrio.errors.GeometryError,
        pyogrio.errors.FeatureError,
        pyogrio.errors.FieldError,
        pyogrio.errors.CRSError,
        shapely.errors.ShapelyError,
        pyproj.exceptions.ProjError,
        UnicodeDecodeError,
    )
    try:
        yield
    except failures as error:
        raise InputError(f"{path}: cannot be read as a vector file ({' '.join(str(error).split())})") from None


@dataclass(frozen=True)
class _Layer:
    name: str
    crs: str | None
    driver: str
    fields: list[str]


def _layer(path: Path, label: Vector) -> _Layer:
    pyogrio, _, _ = _import()
    with _naming(path):
        names = [str(name) for name, _ in pyogrio.list_layers(path)]
        if label.layer is None and len(names) != 1:
            raise InputError(f"{path}: has the layers {', '.join(names) or '(none)'}: name one as label.layer")
        name = names[0] if label.layer is None else label.layer
        if name not in names:
            raise InputError(f"{path}: has no layer {name!r}; it has {', '.join(names)}: correct label.layer")
        info = pyogrio.read_info(path, layer=name)
    fields = [str(field) for field in info["fields"]]
    if label.attribute is not None and label.attribute not in fields:
        raise InputError(
            f"{path}: layer {name!r} has no attribute {label.attribute!r}; it has {', '.join(fields) or 'none'}: "
            "correct label.attribute"
        )
    return _Layer(name, info["crs"] or None, str(info.get("driver", "")), fields)


def check_vector(path: Path, label: Vector, image: str, crs: str | None) -> None:
    """Look whether a vector file has what the recipe names; ``crs`` is that of the image, as WKT.

    Raises:
        InputError: when the extra ``vector`` is not installed, the file cannot be read, its layer or attribute is
            missing, or only one of file and image has a CRS.
    """
    layer = _layer(path, label)
    if (layer.crs is None) != (crs is None):
        lacks, has = (path, image) if layer.crs is None else (image, path)
        raise InputError(f"{lacks}: has no CRS, but {has} has one: add the CRS, or nobody knows where features lie")


class VectorLabel:
    """The features of one scene, in coordinates of its pixels."""

    def __init__(self, path: Path, label: Vector, classes: Sequence[ClassColor], grid: Grid) -> None:
        """Read the features that touch the rectangle of ``grid``.

        Raises:
            InputError: when the file cannot be read or its features cannot be brought to the grid's CRS.
        """
        self._label, self._grid = label, grid
        self._up = _up(grid)
        names = [c.name for c in classes]
        self._codes = {name: place for place, name in enumerate(names)} | {IGNORE_WORD: IGNORE_VALUE}
        if label.attribute is None:
            self._only = next(name for name in names if name != label.background)
        self._background = UNLABELLED if label.background is None else self._codes[label.background]
        with _naming(path):
            self._shapes, texts = _read(path, label, grid)
        _, _, shapely = _import()
        bounds = shapely.bounds(self._shapes)
        self._low, self._high = np.sort(bounds[:, [1, 3]] * self._up, axis=1).T
        targets = [self._target(text) for text in texts]
        self._burned = [UNMATCHED if target is None else self._codes[target] for target in targets]
        unknown = [text for text, target in zip(texts, targets, strict=True) if target is None]
        self.total, self.unmatched = len(texts), len(unknown)
        self._unknown = Counter(unknown)

    @property
    def touches(self) -> bool:
        """Whether any feature touches the scene."""
        return self.total > 0

    def unknown_values(self, most: int = 5) -> list[tuple[str, int]]:
        """The most frequent unknown attribute values with their numbers of features, most frequent first."""
        return sorted(self._unknown.items(), key=lambda item: (-item[1], item[0]))[:most]

    def rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Class ids and reason codes, uint8 [rows,width]."""
        # GDAL cuts edges off at the raster's border, where a touched corner may get lost: one more row on each side.
        first, last = max(0, start - 1), min(self._grid.height, stop + 1)
        here = np.flatnonzero((self._low <= last) & (self._high >= first))
        rows = np.full((last - first, self._grid.width), self._background, dtype=np.uint8)
        if len(here):
            rasterio.features.rasterize(
                [(self._shapes[i], self._burned[i]) for i in here.tolist()],
                out=rows,
                transform=Affine(1, 0, 0, 0, self._up, self._up * first),
                all_touched=self._label.all_touched,
            )
        return rows[start - first : stop - first]

    @property
    def block_height(self) -> int:
        """Rows that are best drawn together."""
        return max(1, _BLOCK // self._grid.width)

    def _target(self, text: str) -> str | None:
        """Class name or "ignore" of an attribute's value; None if the recipe does not know it."""
        if self._label.attribute is None:
            return self._only
        if self._label.map is not None:
            return self._label.map.get(text)
        return text if text in self._codes and text != IGNORE_WORD else None


def _read(path: Path, label: Vector, grid: Grid) -> tuple[Array, list[str]]:
    """Geometries [N] in coordinates of :func:`_to_pixels` and the texts of their attribute, in the file's order."""
    pyogrio, _, shapely = _import()
    layer = _layer(path, label)
    _, fids, geometry, fields = pyogrio.raw.read(
        path,
        layer=layer.name,
        columns=[] if label.attribute is None else [label.attribute],
        bbox=_reach(layer.crs, grid),
        force_2d=True,
        return_fids=True,
    )
    values = [""] * len(fids) if label.attribute is None else [value_text(_plain(v)) for v in fields[0]]
    # A spatial index returns features in an order of its own; GeoJSON has none, but ids that are in no order.
    order = np.arange(len(fids)) if "JSON" in layer.driver else np.argsort(fids, kind="stable")
    shapes = shapely.from_wkb(geometry)[order]
    texts = [values[i] for i in order.tolist()]
    shapes = shapely.transform(shapes, _to_pixels(path, layer.crs, grid))
    bottom, top = sorted((0, _up(grid) * grid.height))
    scene = shapely.box(0, bottom, grid.width, top)
    touching = ~shapely.is_missing(shapes) & ~shapely.is_empty(shapes) & shapely.intersects(_mended(shapes), scene)
    return shapes[touching], [text for text, keep in zip(texts, touching.tolist(), strict=True) if keep]


def _up(grid: Grid) -> int:
    """-1 where rows run against the sense of the coordinates, as north-up: GDAL decides by the sense in which a ring
    turns whether a centre on its edge lies inside, so features must not be mirrored."""
    return -1 if grid.transform.determinant < 0 else 1


def _mended(shapes: Array) -> Array:
    """Boxes around the shapes that cross themselves, for which nobody can say what they intersect."""
    _, _, shapely = _import()
    return np.where(shapely.is_valid(shapes), shapes, shapely.envelope(shapes))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _reach(crs: str | None, grid: Grid) -> tuple[float, float, float, float] | None:
    """Bounds in the layer's CRS beyond which nothing touches the scene; None where these cannot be told."""
    _, pyproj, _ = _import()
    xs, ys = zip(*grid.corners, strict=True)
    bounds = (min(xs), min(ys), max(xs), max(ys))
    if crs is not None and grid.crs is not None:
        transformer = pyproj.Transformer.from_crs(grid.crs.to_wkt(), crs, always_xy=True)
        try:
            bounds = transformer.transform_bounds(*bounds, densify_pts=21, errcheck=True)
        except pyproj.exceptions.ProjError:
            return None
        if not np.isfinite(bounds).all() or bounds[0] > bounds[2]:  # across the antimeridian
            return None
    wide, high = (bounds[2] - bounds[0]) / 20, (bounds[3] - bounds[1]) / 20  # for what bends between the points
    return (bounds[0] - wide, bounds[1] - high, bounds[2] + wide, bounds[3] + high)


def _to_pixels(path: Path, crs: str | None, grid: Grid) -> Callable[[Array], Array]:
    """Turns coordinates [N,2] of the layer into columns and rows of the grid, the rows times :func:`_up`."""
    _, pyproj, _ = _import()
    transformer = None
    if crs is not None and grid.crs is not None and CRS.from_user_input(crs) != grid.crs:
        transformer = pyproj.Transformer.from_crs(crs, grid.crs.to_wkt(), always_xy=True)
    inverse, up = ~grid.transform, _up(grid)

    def to_pixels(places: Array) -> Array:
        xs, ys = places[:, 0], places[:, 1]
        if transformer is not None:
            xs, ys = transformer.transform(xs, ys)
        cols = inverse.a * xs + inverse.b * ys + inverse.c
        rows = (inverse.d * xs + inverse.e * ys + inverse.f) * up
        pixels = np.stack([cols, rows], axis=1)
        if not np.isfinite(pixels).all():
            raise InputError(f"{path}: a feature near the scene has no place in the scene's CRS; reproject the file")
        return np.round(pixels / _STEP) * _STEP

    return to_pixels
