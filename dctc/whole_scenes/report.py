"""Scores of whole scenes as tables, and where a map is wrong as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dctc.evaluation.confusion import Scores, write_rows
from dctc.tracking.figures import confusion_picture, panel, save_picture, stretch
from dctc.whole_scenes.score import SceneScore, SceneScores, picture_places, read_map
from shards.manifest import IGNORE, ClassInfo

COLUMNS = ("miou", "pa", "mpa", "f1", "kappa")
RIGHT, WRONG = (225, 240, 225), (200, 20, 30)


def write_scenes(folder: Path, result: SceneScores, split: str) -> list[Path]:
    """Write the tables of whole scenes into ``folder``.

    ``SPLIT-scenes.csv``: a row a scene and one of all, for all pixels and without boundaries. Of all scenes together,
    ``SPLIT-scenes-total.csv`` (per class) and ``SPLIT-scenes-total-confusion.csv`` and ``.png``, the same with
    ``-eroded`` after ``total``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = [["scene", "boundaries", *COLUMNS, "pixels", "unpredicted"]]
    for name, totals in [*result.scenes.items(), ("total", result.total)]:
        for part, scores in (("with", totals.all), ("eroded", totals.eroded)):
            rows.append([name, part, *_cells(scores), totals.unpredicted])
    table = folder / f"{split}-scenes.csv"
    write_rows(table, rows)
    files = [table]
    for end, total in (("", result.total.all), ("-eroded", result.total.eroded)):
        if total is not None:
            stem = f"{split}-scenes-total{end}"
            files += [folder / f"{stem}.csv", folder / f"{stem}-confusion.csv", folder / f"{stem}-confusion.png"]
            total.write_csv(files[-3], result.without)
            total.write_matrix_csv(files[-2])
            save_picture(confusion_picture(total.matrix, total.names, f"{split}, whole scenes{end}"), files[-1])
    return files


def _cells(scores: Scores | None) -> list[object]:
    if scores is None:
        return [*("" for _ in COLUMNS), 0]
    record = scores.as_record()
    values = [record[key] for key in COLUMNS]
    return [*("" if not isinstance(v, float) or math.isnan(v) else repr(v) for v in values), scores.pixels]


def error_picture(score: SceneScore, classes: Sequence[ClassInfo], folder: Path) -> Path:
    """Write image | label | prediction | errors of a scene as ``STEM_errors.png``; returns its path.

    Errors are red, what is right is pale green, what has no label or no prediction is hatched.
    """
    rows, columns = picture_places(*score.truth.shape)
    places = np.ix_(rows, columns)
    predicted = read_map(score.map)[places]
    truth = score.truth[places]
    shown = stretch(score.shown[None], (predicted != IGNORE)[None])
    judged = np.where((predicted == truth)[..., None], RIGHT, WRONG).astype(np.uint8)
    scored = (truth != IGNORE) & (predicted != IGNORE)
    # The panel hatches pixels that are not finite in a column of images.
    errors = np.where(scored[..., None], judged.astype(np.float32), np.nan)
    table: dict[str, NDArray[Any]] = {
        "image": shown.transpose(0, 3, 1, 2).astype(np.float32),
        "label": truth[None],
        "prediction": predicted[None],
        "errors": errors.transpose(2, 0, 1)[None],
    }
    cell = min(512, len(columns))
    picture = panel(table, classes, rows=[score.name], limits=[(0, 255)] * 3, cell=max(cell, 256))
    return save_picture(picture, folder / f"{score.image.stem}_errors.png")
