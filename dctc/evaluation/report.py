"""An evaluation as files: tables and the confusion matrix of every net."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dctc.evaluation.confusion import write_rows
from dctc.evaluation.evaluate import Evaluation, NetResult
from dctc.tracking.figures import confusion_picture, reliability_picture, save_picture


def write_evaluation(folder: Path, evaluation: Evaluation, prefix: str) -> list[Path]:
    """Write the tables and pictures of each net with scores.

    ``PREFIX-NET.csv`` (per class), ``PREFIX-NET-confusion.csv`` and ``.png``; by bin of confidence
    ``PREFIX-NET-calibration.csv`` of softmax(z), ``PREFIX-NET-calibration-sharpened.csv`` of softmax(z/T) and
    ``PREFIX-NET-calibration.png`` of both; of each class in all nets ``PREFIX-classes.csv`` (IoU) and
    ``PREFIX-classes-ece.csv`` (calibration error of softmax(z) where it is predicted).
    """
    folder.mkdir(parents=True, exist_ok=True)
    nets = {name: net for name, net in evaluation.nets.items() if net.scores is not None}
    files = [file for name, net in nets.items() for file in _files_of_net(folder / f"{prefix}-{name}", net)]
    if nets:
        ious = {name: [*map(float, net.scores.iou), net.scores.miou] for name, net in nets.items() if net.scores}
        errors = {name: [*map(net.reliability.ece_of, range(len(net.reliability.names))), net.reliability.ece]
                  for name, net in nets.items()}  # fmt: skip
        classes = next(iter(nets.values())).reliability.names
        files.append(_table_of_classes(folder / f"{prefix}-classes.csv", [*classes, "mean"], ious))
        files.append(_table_of_classes(folder / f"{prefix}-classes-ece.csv", [*classes, "all pixels"], errors))
    return files


def _files_of_net(stem: Path, net: NetResult) -> list[Path]:
    """Files whose names begin with ``stem``."""
    ends = ("", "-confusion", "-calibration", "-calibration-sharpened")
    table, matrix, bins, sharpened = (stem.with_name(f"{stem.name}{end}.csv") for end in ends)
    picture, diagram = (stem.with_name(f"{stem.name}{end}.png") for end in ends[1:3])
    title = ", ".join(stem.name.split("-", 1))
    assert net.scores is not None
    net.scores.write_csv(table, net.without)
    net.scores.write_matrix_csv(matrix)
    save_picture(confusion_picture(net.scores.matrix, net.scores.names, title), picture)
    both = {"softmax(z)": net.reliability, "softmax(z/T)": net.sharpened_reliability}
    for file, reliability in zip((bins, sharpened), both.values(), strict=True):
        write_rows(file, reliability.rows())
    curves = {f"{name}, ECE {100 * each.ece:.1f} %": each.rows()[1:] for name, each in both.items()}
    save_picture(reliability_picture(curves, title), diagram)
    return [table, matrix, picture, bins, sharpened, diagram]


def _table_of_classes(path: Path, rows: Sequence[str], nets: Mapping[str, Sequence[float]]) -> Path:
    """A row a class, a column a net; a nan is an empty cell."""
    table: list[list[object]] = [["class", *nets]]
    for name, *values in zip(rows, *nets.values(), strict=True):
        table.append([name, *("" if math.isnan(value) else repr(value) for value in values)])
    write_rows(path, table)
    return path
