"""Predictions of several runs on the same tiles, as in the paper's figures 3 to 5, from the runs' artifacts."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dctc.tracking.compare import Comparison
from dctc.tracking.figures import panel
from dctc.tracking.found import FoundRun, open_client
from shards.manifest import ClassInfo

TILES = "tiles.npz"  # artifact of a run
MOST = 4  # tiles in a panel
Arrays = Mapping[str, NDArray[Any]]


def panels(uri: str, comparison: Comparison) -> list[tuple[str, bytes]]:
    """(caption, PNG) of every row over its columns, and of every column over its rows, where there are at least two.

    Each shows the headline of the first run of a cell. Runs without the artifact, or on other tiles, are left out.
    """
    shown: dict[tuple[str, str], Arrays] = {}
    for key, runs in comparison.runs.items():
        if (tiles := _tiles(uri, runs[0])) is not None and f"net/{runs[0].headline}" in tiles:
            shown[key] = {**tiles, "map": tiles[f"net/{runs[0].headline}"]}
    rows = list(dict.fromkeys(row for row, _ in comparison.rows))
    found = []
    for row in rows:
        columns = {f"{comparison.axes[1]} {c}": shown[row, c] for c in comparison.columns if (row, c) in shown}
        found += _panel(row, columns)
    for column in comparison.columns:
        found += _panel(
            f"{comparison.axes[1]} {column}", {row: shown[row, column] for row in rows if (row, column) in shown}
        )
    return found


def _tiles(uri: str, run: FoundRun) -> Arrays | None:
    client = open_client(uri)
    if TILES not in {file.path for file in client.list_artifacts(run.id)}:
        return None
    with tempfile.TemporaryDirectory(prefix="dctc-tiles-") as folder:
        path = Path(client.download_artifacts(run.id, TILES, folder))
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


def _panel(caption: str, maps: Mapping[str, Arrays]) -> list[tuple[str, bytes]]:
    first = next(iter(maps.values()), None)
    if first is None:
        return []
    same = {title: arrays["map"] for title, arrays in maps.items() if np.array_equal(arrays["image"], first["image"])}
    if len(same) < 2:
        return []
    some = slice(0, MOST)
    columns: dict[str, NDArray[Any]] = {"image": first["image"][some], "label": first["label"][some]}
    columns |= {title: values[some] for title, values in same.items()}
    names: Sequence[str] = first["classes"].tolist()
    classes = [
        ClassInfo(name=name, color=tuple(color))
        for name, color in zip(names, first["colors"].tolist(), strict=True)
    ]  # fmt: skip
    limits = [(float(low), float(high)) for low, high in first["limits"]]
    data = io.BytesIO()
    panel(columns, classes, valid=first["valid"][some], limits=limits, cell=160).save(data, "PNG")
    return [(caption, data.getvalue())]
