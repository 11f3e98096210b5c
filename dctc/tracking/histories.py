"""Curves over the rounds of the compared runs: how good what the nets say of unlabelled tiles is, by net and class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dctc.tracking.charts import Series
from dctc.tracking.comparison import Comparison
from dctc.tracking.found import FoundRun, open_client
from dctc.tracking.page import History

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PSEUDO, DYING = "train/pseudo/", "train/dying/"


def histories(uri: str, comparison: Comparison) -> list[History]:
    """For the first run of each cell: mIoU of each net on unlabelled tiles whose labels are held back, IoU by class of
    its headline there, and the number of dying classes of each net. Curves of a single point are left out."""
    found = []
    client = open_client(uri)
    rows = list(dict.fromkeys(row for row, _ in comparison.rows))
    keys = [(row, column) for row in rows for column in comparison.columns if (row, column) in comparison.runs]
    for row, column in keys:
        run = comparison.runs[row, column][0]
        curves = _curves(client, run)
        label = f"{row}, {comparison.axes[1]} {column}"
        by_net = {key.split("/")[2]: line for key, line in curves.items() if key.endswith("/miou")}
        prefix = f"{PSEUDO}{run.headline}/iou/"
        by_class = {key.removeprefix(prefix): line for key, line in curves.items() if key.startswith(prefix)}
        dying = {key.removeprefix(DYING): line for key, line in curves.items() if key.startswith(DYING)}
        for caption, lines in (
            (f"{label}: mIoU on unlabelled tiles, %", by_net),
            (f"{label}: IoU of {run.headline} there, %", by_class),
            (f"{label}: dying classes", dying if any(y for line in dying.values() for _, y, _ in line) else {}),
        ):
            if lines:
                found.append(History(caption, [Series(name, points) for name, points in lines.items()]))
    return found


def _curves(client: MlflowClient, run: FoundRun) -> Mapping[str, list[tuple[float, float, float]]]:
    """Metric -> (round, value, 0), values of pseudo labels in percent; those with at least two points."""
    curves = {}
    for key in sorted(run.metrics):
        wanted = key.startswith(DYING) or (key.startswith(PSEUDO) and (key.endswith("/miou") or "/iou/" in key))
        if not wanted:
            continue
        scale = 1.0 if key.startswith(DYING) else 100.0
        history = client.get_metric_history(run.id, key)
        points = {point.step: scale * point.value for point in history if math.isfinite(point.value)}
        if len(points) > 1:
            curves[key] = [(float(step), value, 0.0) for step, value in sorted(points.items())]
    return curves
