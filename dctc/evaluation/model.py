"""A model file against a dataset: what ``dctc evaluate`` does."""

from __future__ import annotations

from functools import partial

import torch

from dctc.bundle import Bundle
from dctc.data.loaders import Normaliser, evaluation_batches
from dctc.data.order import Layout
from dctc.evaluation.evaluate import Evaluation, evaluate_tiles
from dctc.methods.base import inference
from dctc.methods.turns import mean_over_views
from shards.errors import InputError
from shards.index import Index
from shards.manifest import SPLITS, Dataset


def evaluate_model(
    bundle: Bundle, dataset: Dataset, split: str = "test", batch: int = 8, workers: int = 0, tta: bool = False
) -> Evaluation:
    """Score every net of a model on one split, in float32, with the model's own normalisation.

    Args:
        tta: of each net the mean probability over the eight flips and quarter turns of a tile.

    Raises:
        InputError: unknown or empty split, no labels in it, or a dataset of other bands, pixel type or classes.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    check_fit(bundle, dataset)
    rows = Index.open(dataset).rows(split)
    if not len(rows):
        raise InputError(f"{dataset.location}: its {split} split has no tiles; choose another with --split")
    normaliser = Normaliser.from_values(bundle.description.mean, bundle.description.std, bundle.device)
    with inference(*bundle.method.parts.values()):
        evaluation = evaluate_tiles(
            partial(mean_over_views, bundle.method.logits) if tta else bundle.method.logits,
            evaluation_batches(dataset, rows, batch, Layout(), normaliser, workers),
            dataset.manifest.class_names,
            bundle.device,
            reduce=lambda tensor: tensor,
            temperature=bundle.method.temperature,
        )
    if evaluation.nets[bundle.headline].scores is None:
        raise InputError(f"{dataset.location}: its {split} split has no labelled pixel to score on")
    return evaluation


def check_fit(bundle: Bundle, dataset: Dataset, *, classes: bool = True) -> None:
    """Raise :class:`InputError` unless bands, pixel type and, where they matter, classes are the model's."""
    manifest = dataset.manifest
    facts = {
        "bands": (bundle.bands, [band.name for band in manifest.bands]),
        "pixel type": (bundle.dtype, manifest.dtype),
    }
    if classes:
        facts["classes"] = ([c.name for c in bundle.classes], manifest.class_names)
    for what, (wanted, found) in facts.items():
        if wanted != found:
            raise InputError(f"{dataset.location}: its {what} are {found}, the model was trained on {wanted}")


def check_net(bundle: Bundle, net: str | None) -> None:
    """Raise :class:`InputError` unless the model has a net of this name; None stands for its headline.

    A method says what its nets are by its output alone, so one tile without data is predicted.
    """
    if net is None:
        return
    nets = bundle.logits(torch.zeros(1, len(bundle.bands), bundle.tile_size, bundle.tile_size))
    if net not in nets:
        raise InputError(f"net {net!r} is not in this model: it has {', '.join(nets)}")
