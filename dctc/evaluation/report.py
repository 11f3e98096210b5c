"""An evaluation as files: tables and the confusion matrix of every net."""

from __future__ import annotations

from pathlib import Path

from dctc.evaluation.evaluate import Evaluation
from dctc.tracking.figures import confusion_picture, save_picture


def write_evaluation(folder: Path, evaluation: Evaluation, prefix: str) -> list[Path]:
    """Write, for each net with scores, ``PREFIX-NET.csv`` (per class), ``PREFIX-NET-confusion.csv`` and ``.png``."""
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
    return files
