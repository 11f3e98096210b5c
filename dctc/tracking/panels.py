"""Predictions of several runs on the same tiles, as in the paper's figures 3 to 5, from the runs' artifacts."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dctc.tracking.comparison import Comparison
from dctc.tracking.figures import panel
from dctc.tracking.found import FoundRun, open_client
from shards.manifest import ClassInfo

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TILES = "tiles.npz"  # artifact of a run
MOST = 4  # tiles in a panel
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Panels:
    """Pictures of a comparison.

    Attributes:
        pictures: caption and PNG bytes.
        notes: which runs are missing in them, and why.
    """

    pictures: Sequence[tuple[str, bytes]]
    notes: Sequence[str]


def panels(uri: str, comparison: Comparison) -> Panels:
    """A picture of every row over its columns, and of every column over its rows, where there are at least two.

    Each shows the headline of the first run of a cell. Runs without the artifact, or on other tiles, are left out and
    named.
    """
    client = open_client(uri)
    shown: dict[tuple[str, str], Arrays] = {}
    missing: list[str] = []
    for key, runs in comparison.runs.items():
        tiles = _tiles(client, runs[0])
        if tiles is None or f"net/{runs[0].headline}" not in tiles:
            missing.append(runs[0].name)
        else:
            shown[key] = {**tiles, "map": tiles[f"net/{runs[0].headline}"]}
    first = next((tiles["image"] for tiles in shown.values()), None)
    other = [key for key, tiles in shown.items() if first is None or not np.array_equal(tiles["image"], first)]
    names = [comparison.runs[key][0].name for key in other]
    shown = {key: tiles for key, tiles in shown.items() if key not in other}
    rows = list(dict.fromkeys(row for row, _ in comparison.rows))
    axis = comparison.axes[1]
    found = []
    for row in rows:
        found += _panel(row, {f"{axis} {c}": shown[row, c] for c in comparison.columns if (row, c) in shown})
    for column in comparison.columns:
        found += _panel(f"{axis} {column}", {row: shown[row, column] for row in rows if (row, column) in shown})
    reasons = (
        (missing, f"whose {TILES} is not in MLflow, or cannot be read"),
        (names, "on other tiles than the first"),
    )
    notes = [
        f"no predictions to show of {len(some)} run(s) {why}: {', '.join(some[:4])}{', ...' if len(some) > 4 else ''}"
        for some, why in reasons if some
    ]  # fmt: skip
    return Panels(found, notes)


def _tiles(client: MlflowClient, run: FoundRun) -> Arrays | None:
    """None where there are none, or where the files that the server names cannot be reached from here."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="dctc-tiles-") as folder:
        try:
            if TILES not in {file.path for file in client.list_artifacts(run.id)}:
                return None
            path = Path(client.download_artifacts(run.id, TILES, folder))
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (MlflowException, OSError, ValueError, BadZipFile):
            return None


def _panel(caption: str, maps: Mapping[str, Arrays]) -> list[tuple[str, bytes]]:
    if len(maps) < 2:
        return []
    first = next(iter(maps.values()))
    some = slice(0, MOST)
    columns: dict[str, NDArray[Any]] = {"image": first["image"][some], "label": first["label"][some]}
    columns |= {title: tiles["map"][some] for title, tiles in maps.items()}
    names: Sequence[str] = first["classes"].tolist()
    classes = [
        ClassInfo(name=name, color=tuple(color))
        for name, color in zip(names, first["colors"].tolist(), strict=True)
    ]  # fmt: skip
    limits = [(float(low), float(high)) for low, high in first["limits"]]
    data = io.BytesIO()
    panel(columns, classes, valid=first["valid"][some], limits=limits, cell=160).save(data, "PNG")
    return [(caption, data.getvalue())]
