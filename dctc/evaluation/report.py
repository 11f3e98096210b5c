"""An evaluation as files: tables and the confusion matrix of every net."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dctc.evaluation.confusion import Scores, write_rows
from dctc.evaluation.evaluate import Evaluation
from dctc.tracking.figures import confusion_picture, reliability_picture, save_picture


def write_evaluation(folder: Path, evaluation: Evaluation, prefix: str) -> list[Path]:
    """Write the tables and pictures of each net with scores.

    ``PREFIX-NET.csv`` (per class), ``PREFIX-NET-confusion.csv`` and ``.png``, ``PREFIX-NET-calibration.csv`` and
    ``.png``, and ``PREFIX-classes.csv``, the IoU of each class in all nets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, net in evaluation.nets.items():
        if net.scores is None:
            continue
        table, matrix, picture = (
            folder / f"{prefix}-{name}{end}" for end in (".csv", "-confusion.csv", "-confusion.png")
        )
        net.scores.write_csv(table)
        net.scores.write_matrix_csv(matrix)
        save_picture(confusion_picture(net.scores.matrix, net.scores.names, f"{prefix}, {name}"), picture)
        files += [table, matrix, picture]
        bins, diagram = (folder / f"{prefix}-{name}-calibration{end}" for end in (".csv", ".png"))
        write_rows(bins, net.reliability.rows())
        title = f"{prefix}, {name}: ECE {100 * net.reliability.ece:.1f} %"
        save_picture(reliability_picture(net.reliability.rows()[1:], title), diagram)
        files += [bins, diagram]
    nets = {name: net.scores for name, net in evaluation.nets.items() if net.scores is not None}
    if nets:
        files.append(_table_of_classes(folder / f"{prefix}-classes.csv", nets))
    return files


def _table_of_classes(path: Path, nets: Mapping[str, Scores]) -> Path:
    """IoU of every class, a column a net; an absent class has empty cells."""
    names = next(iter(nets.values())).names
    rows: list[list[object]] = [["class", *nets]]
    for index, name in enumerate(names):
        values = [float(scores.iou[index]) for scores in nets.values()]
        rows.append([name, *("" if math.isnan(value) else repr(value) for value in values)])
    rows.append(["mean", *(repr(scores.miou) for scores in nets.values())])
    write_rows(path, rows)
    return path
