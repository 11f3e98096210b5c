"""Score the training tiles without a label and choose some of them, spread over the scenes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from dctc.bundle import Bundle
from dctc.data.loaders import Normaliser
from dctc.data.tiles import TileDataset
from dctc.evaluation.confusion import entropy
from dctc.evaluation.evaluate import STUDENTS
from dctc.evaluation.model import check_fit, check_net
from dctc.methods.base import inference
from shards.errors import InputError
from shards.index import Index
from shards.manifest import Dataset

DIGITS = 6  # of a score: what another batch size changes in the last bits must not change the order

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """What a model thinks of N tiles.

    Attributes:
        rows: int64 [N], index rows, ascending.
        entropy: [N], predictive entropy in nats, mean over the tile's pixels; one without data counts as 0.
        disagreement: [N], share of the tile's pixels that the two students give different classes; None for a model
            without two students.
        score: [N] in [0, 1]: the mean of entropy / ln K and disagreement, or entropy / ln K alone.
    """

    rows: NDArray[np.int64]
    entropy: Floats
    disagreement: Floats | None
    score: Floats


@dataclass(frozen=True)
class Suggestion:
    """The tiles to label next.

    Attributes:
        scored: the chosen tiles, the highest score first.
        labelled: int64, rows whose labels are there already, in their nested order.
        candidates: how many tiles there were to choose from.
    """

    scored: Scored
    labelled: NDArray[np.int64]
    candidates: int


def suggest(
    bundle: Bundle,
    dataset: Dataset,
    budget: int,
    *,
    share: Fraction | None = None,
    net: str | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Suggestion:
    """Choose ``budget`` training tiles that have no label. No label is read, only whether a tile has one.

    Args:
        share: take the training tiles outside of this labelled share for unlabelled; None: those without a label.
        net: whose entropy counts; the model's headline by default.
        progress: called with (tiles done, tiles in all).

    Raises:
        InputError: fewer such tiles than ``budget``, an unknown net, or a dataset of other bands or another pixel type.
    """
    check_fit(bundle, dataset, classes=False)
    check_net(bundle, net)
    index = Index.open(dataset)
    labelled = index.labelled_rows(Fraction(1) if share is None else share)
    rows = np.setdiff1d(index.rows("train"), labelled)
    if not len(rows):
        raise InputError(
            f"{dataset.location}: every training tile has a label; name the share that the model learnt from, as "
            "--labelled-share 1/8, and the other tiles count as unlabelled"
        )
    if not 1 <= budget <= len(rows):
        raise InputError(f"--budget {budget}: {dataset.location} has {len(rows)} unlabelled training tiles: 1 to that")
    scored = score_tiles(bundle, dataset, rows, net, batch, progress)
    order = spread(scored.score, index.scene[rows], budget, index.scene[labelled])
    picked = Scored(
        scored.rows[order],
        scored.entropy[order],
        None if scored.disagreement is None else scored.disagreement[order],
        scored.score[order],
    )
    return Suggestion(picked, labelled, len(rows))


def score_tiles(
    bundle: Bundle,
    dataset: Dataset,
    rows: NDArray[np.int64],
    net: str | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Score the tiles of ``rows``, int64 [N] and ascending, by a model's uncertainty."""
    name = bundle.headline if net is None else net
    normaliser = Normaliser.from_values(bundle.description.mean, bundle.description.std, bundle.device)
    tiles = TileDataset(dataset, labels=False)
    reading = np.argsort(tiles.index.shard[rows], kind="stable")  # each shard of a remote dataset in one stretch
    doubts, quarrels = np.zeros(len(rows)), np.zeros(len(rows))
    students = False
    with inference(*bundle.method.parts.values()):
        for start in range(0, len(rows), batch):
            places = reading[start : start + batch]
            raw = tiles.__getitems__([(0, int(row)) for row in rows[places]])
            valid = raw["valid"].to(bundle.device)
            nets = bundle.method.logits(normaliser(raw["images"].to(bundle.device), valid))
            doubts[places] = _mean(entropy(nets[name]), valid)
            students = nets.keys() >= set(STUDENTS)
            if students:
                first, second = (nets[student].argmax(1) for student in STUDENTS)
                quarrels[places] = _mean(first != second, valid)
            if progress is not None:
                progress(min(start + batch, len(rows)), len(rows))
    score = doubts / math.log(max(2, len(bundle.classes)))
    if students:
        score = (score + quarrels) / 2
    return Scored(rows, doubts, quarrels if students else None, score.round(DIGITS))


def _mean(values: torch.Tensor, valid: torch.Tensor) -> Floats:
    """[B,H,W] to float64 [B]; what is not ``valid`` counts as 0, for there is nothing to label."""
    mean: Floats = torch.where(valid, values.double(), 0.0).mean((1, 2)).cpu().numpy()
    if not np.isfinite(mean).all():
        raise InputError("the model's predictions are not finite; it is damaged, or diverged in training")
    return mean


def spread(score: Floats, scenes: NDArray[np.integer], budget: int, labelled: NDArray[np.integer]) -> NDArray[np.int64]:
    """Places of ``budget`` tiles, an equal number a scene, the best score first; ties: the first one.

    ``scenes`` [N] are the scenes of the tiles, ``labelled`` those of the tiles that have a label, each as often as it
    has such tiles. The budget goes to the scenes with the fewest labelled tiles, old and new, until they are level, and
    from there on round by round; where a round does not reach all, the scenes with the higher scores get theirs. Of a
    scene the best tiles are taken. What a scene has already counts because scenes differ in light, season and ground.
    """
    order = np.argsort(-score, kind="stable")
    place = np.zeros(len(score), np.int64)  # of a tile among those of its scene, from the number of labelled ones
    for scene in np.unique(scenes):
        of_scene = order[scenes[order] == scene]
        place[of_scene] = np.arange(len(of_scene)) + np.count_nonzero(labelled == scene)
    chosen = np.lexsort((-score, place))[:budget]
    best_first: NDArray[np.int64] = chosen[np.lexsort((chosen, -score[chosen]))]
    return best_first
