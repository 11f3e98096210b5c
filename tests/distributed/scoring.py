"""Scores a model in real processes: what each rank found, summed over the ranks.

    accelerate launch --config_file launch/ddp.yaml --num_processes 3 tests/distributed/scoring.py MODEL DATASET N OUT

N is how many training tiles, OUT a JSON file. PYTHONPATH must name the repository's root.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dctc.bundle import Bundle
from dctc.data.loaders import Normaliser, evaluation_batches
from dctc.data.order import Layout
from dctc.engine.parallel import Parallel
from dctc.evaluation.evaluate import Evaluation, evaluate_tiles
from dctc.methods.base import inference
from shards.index import Index
from shards.manifest import Dataset


def score(model: Path, folder: Path, count: int, parallel: Parallel | None = None) -> Evaluation:
    """The first ``count`` training tiles, one at a time, so that a tile's logits know nothing of the layout."""
    bundle, dataset = Bundle.load(model), Dataset.open(folder)
    layout = Layout() if parallel is None else Layout(parallel.world, parallel.rank)
    batches = evaluation_batches(
        dataset,
        Index.open(dataset).rows("train")[:count],
        1,
        layout,
        Normaliser.of(dataset.manifest, torch.device("cpu")),
    )
    with inference(*bundle.method.parts.values()):
        return evaluate_tiles(
            bundle.method.logits,
            batches,
            dataset.manifest.class_names,
            torch.device("cpu"),
            (lambda tensor: tensor) if parallel is None else parallel.sum,
        )


def main(model: str, folder: str, count: str, file: str) -> None:
    """Rank 0 writes the record and the number of ranks."""
    torch.set_num_threads(1)
    with Parallel() as parallel:
        record = score(Path(model), Path(folder), int(count), parallel).as_record()
        if parallel.is_main:
            Path(file).write_text(json.dumps(record | {"world": parallel.world}))


if __name__ == "__main__":
    main(*sys.argv[1:])
