"""A suggestion as files: footprints for an annotator, lists of ids for ``dctc shard``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dctc.suggest.choose import Suggestion
from shards.errors import InputError
from shards.index import Index, tile_name
from shards.manifest import SPLITS, Dataset
from shards.tiles import read_meta

IDENTITY = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
GDAL_DATE = "OGR_CURRENT_DATE"  # when a layer was changed; fixed, so that the same suggestion is the same file


def records_of(dataset: Dataset, suggestion: Suggestion) -> list[dict[str, Any]]:
    """The tiles as rows of a table, by rank from 1: ``rank``, ``tile``, ``scene``, ``row``, ``col`` (of the tile's
    upper left pixel), ``score``, ``entropy`` in nats, ``disagreement`` or None; and ``crs`` and ``corners``."""
    index, scored = Index.open(dataset, hashed=False), suggestion.scored
    records = []
    for place, row in enumerate(scored.rows.tolist()):
        meta = read_meta(dataset, index, row)
        window = meta["window"]
        records.append(
            {
                "rank": place + 1,
                "tile": tile_name(dataset, index, row),
                "scene": meta["scene"],
                "row": window["row"],
                "col": window["col"],
                "score": float(scored.score[place]),
                "entropy": float(scored.entropy[place]),
                "disagreement": None if scored.disagreement is None else float(scored.disagreement[place]),
                "crs": meta["crs"],
                "corners": _corners(meta),
            }
        )
    return records


def _corners(meta: dict[str, Any]) -> list[tuple[float, float]]:
    """The four corners of a tile in its scene's CRS, around.

    A scene without georeference is shown by QGIS in pixels with rows downwards from 0, that is at negative y.
    """
    a, b, c, d, e, f = meta["transform"]
    height, width = meta["window"]["height"], meta["window"]["width"]
    if meta["crs"] is None and [a, b, d, e] == [IDENTITY[k] for k in (0, 1, 3, 4)]:
        e, f = -1.0, -f
    places = [(0, 0), (width, 0), (width, height), (0, height)]
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in places]


def write_footprints(path: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    """Write a GeoPackage of polygons, a layer for each CRS, and return the layers' names.

    One CRS: the layer ``tiles``; several: ``tiles_1``, ``tiles_2`` ... in the order of their first rank. A layer of
    scenes without CRS has none, and its name ends with ``_without_crs``. The file is whole or absent.

    Raises:
        InputError: when shapely or pyogrio are missing or the file cannot be written.
    """
    try:
        import pyogrio
    except ImportError as error:
        raise InputError(f"a GeoPackage needs {error.name}: pip install -c constraints.txt -e .[vector]") from None
    systems = list(dict.fromkeys(record["crs"] for record in records))
    draft = path.with_name(f".{path.stem}.{os.getpid()}.gpkg")
    names = []
    before = pyogrio.get_gdal_config_option(GDAL_DATE)
    pyogrio.set_gdal_config_options({GDAL_DATE: "1970-01-01T00:00:00Z"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        for number, crs in enumerate(systems, 1):
            name = "tiles" if len(systems) == 1 else f"tiles_{number}"
            names.append(name + ("_without_crs" if crs is None else ""))
            _write_layer(draft, names[-1], crs, [record for record in records if record["crs"] == crs])
        draft.replace(path)
    except (
        OSError,
        pyogrio.errors.DataSourceError,
        pyogrio.errors.DataLayerError,
        pyogrio.errors.FeatureError,
    ) as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another --out") from None
    finally:
        pyogrio.set_gdal_config_options({GDAL_DATE: before})
        draft.unlink(missing_ok=True)
    return names


def _write_layer(path: Path, name: str, crs: str | None, records: Sequence[dict[str, Any]]) -> None:
    import pyogrio.raw
    import shapely

    fields = ["rank", "tile", "scene", "row", "col", "score", "entropy"]
    if records[0]["disagreement"] is not None:
        fields.append("disagreement")
    columns = [np.array([record[field] for record in records]) for field in fields]
    columns = [column.astype(object) if column.dtype.kind == "U" else column for column in columns]
    shapes = shapely.to_wkb([shapely.Polygon(record["corners"]) for record in records])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*crs.*")  # that a layer has none is what its name says
        pyogrio.raw.write(
            path, np.asarray(shapes, object), columns, fields, layer=name, driver="GPKG", geometry_type="Polygon",
            crs=crs, append=path.exists(),
        )  # fmt: skip


def write_lists(path: Path, dataset: Dataset, suggestion: Suggestion) -> dict[str, Path]:
    """Write the lists that ``dctc shard`` takes back, beside ``path``, and return them by their place in a recipe.

    ``STEM.txt`` for ``labelled.file``: the tiles with a label, then the suggested ones by rank. ``STEM_train.txt``,
    ``STEM_val.txt`` and ``STEM_test.txt`` for ``splits.files``: the splits as they are, because splits that are drawn
    from what is labelled would be drawn anew when more is. A split without tiles has no list; tiles of val and test
    whose label has no class stand in none.
    """
    index = Index.open(dataset, hashed=False)
    first = [*suggestion.labelled.tolist(), *suggestion.scored.rows.tolist()]
    rows = {"labelled.file": first}
    for split in SPLITS:
        members = index.rows(split)
        rows[f"splits.files.{split}"] = (members if split == "train" else members[index.classes[members] > 0]).tolist()
    ends = {key: "" if key == "labelled.file" else f"_{key.rsplit('.', 1)[1]}" for key in rows}
    files = {}
    for key, chosen in rows.items():
        if chosen:
            files[key] = path.with_name(f"{path.stem}{ends[key]}.txt")
            _write_list(files[key], [tile_name(dataset, index, row) for row in chosen])
    return files


def _write_list(path: Path, ids: Sequence[str]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text("\n".join([*ids, ""]), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    finally:
        draft.unlink(missing_ok=True)
