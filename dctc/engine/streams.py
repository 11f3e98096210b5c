"""Which tiles a run reads: its two training streams, and what is looked at beside the training."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction

import numpy as np

from dctc.config import Config
from dctc.data.augment import BoxSpec
from dctc.data.loaders import TrainingStream
from dctc.data.order import LABELLED, Indices, Layout
from dctc.engine.watch import PROBE_TILES
from dctc.methods.base import Method, Needs
from shards.index import Index
from shards.manifest import Dataset

HALF = Fraction(1, 2)


def idle_data(config: Config, method: Method) -> list[str]:
    """A line for each key of ``data`` that has been chosen and does nothing for this method."""
    viewed = any(needs.views and needs.kind == "strong" for needs in (method.labelled_needs, method.unlabelled_needs))
    if config.data.photometry == 1 or config.data.augment == "strong" or viewed:
        return []
    return ["data.photometry does nothing: it is of data.augment=strong and of methods with strong views"]


def training_stream(
    config: Config, dataset: Dataset, layout: Layout, number: int, rows: Indices, needs: Needs
) -> TrainingStream:
    """Stream ``number`` over ``rows``, with what the method needs of it."""
    labelled = number == LABELLED
    augment = config.data.augment
    if not labelled and augment == "strong":
        augment = "weak"  # pseudo labels are never of a strong view; what learns from one is the method's matter
    return TrainingStream(
        dataset=dataset,
        number=number,
        rows=rows,
        batch=config.data.batch_labelled if labelled else config.data.batch_unlabelled,
        seed=config.run.seed,
        layout=layout,
        augment=augment,
        cutmix=config.data.cutmix and labelled,
        workers=config.data.workers,
        labels=labelled,
        order=config.data.resolved_order,
        mix=config.data.mix,
        substitute=config.data.on_damage == "substitute",
        prefetch=config.data.prefetch,
        views=needs.views,
        view_kind=needs.kind,
        photometry=config.data.photometry,
        boxes=None if needs.boxes is None else BoxSpec(**asdict(needs.boxes)),
        numbered=needs.keys,
    )


def watched_rows(
    dataset: Dataset, index: Index, labelled: Indices, unlabelled: Indices, pictures: int
) -> dict[str, Indices]:
    """Fixed samples spread evenly over their sets, so that curves and pictures always show the same tiles.

    A split without a label cannot be scored: it has no rows here.
    """
    scored = dataset.manifest.splits
    val, test = (index.rows(split) if scored[split].labelled else labelled[:0] for split in ("val", "test"))
    return {
        "val": val,
        "test": test,
        "labelled": labelled,
        "unlabelled": unlabelled,
        "probe": _spread(_held_back(index, unlabelled), PROBE_TILES),
        "pictures": _spread(next(rows for rows in (val, unlabelled) if len(rows)), pictures),
    }


def _held_back(index: Index, unlabelled: Indices) -> Indices:
    """Those that a half of the labels leaves unlabelled: the same tiles at every share up to it, and at all labels."""
    held = np.intersect1d(unlabelled, index.unlabelled_rows(HALF))
    return held if len(held) else unlabelled


def _spread(rows: Indices, count: int) -> Indices:
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64)]
