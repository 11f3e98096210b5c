"""Trains several runs in one process group, one after the other: starting processes costs more than tiny runs.

    accelerate launch --config_file launch/ddp.yaml --num_processes 2 tests/distributed/matrix.py CONFIG [KEYS ...]

Each KEYS is one run: its overrides, separated by spaces. PYTHONPATH must name the repository's root.
"""

from __future__ import annotations

import sys

import torch

from dctc.config import load_config
from dctc.engine.build import resolve, settle
from dctc.engine.parallel import Parallel
from dctc.engine.preempt import StopRequest
from dctc.train import train
from shards.manifest import Dataset


def main(config_file: str, runs: list[str]) -> None:
    """Train each of ``runs`` as ``dctc/train.py`` would."""
    torch.set_num_threads(1)
    parallel = Parallel()
    stop = StopRequest()
    try:
        for keys in runs:
            config = settle(resolve(load_config(config_file, keys.split())), parallel.device)
            dataset = Dataset.open(config.data.dataset, config.data.cache_settings)
            assert train(config, dataset, parallel, stop) == 0
    finally:
        parallel.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
