"""Weights for `network.weights`, runs that begin with them, and a stand-in for timm to run them with."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from dctc.config import load_config
from dctc.engine.build import locate, prepare, resolve, settle
from dctc.engine.parallel import Parallel
from dctc.engine.preempt import StopRequest
from dctc.methods import Method
from shards.manifest import Dataset
from tests.stand_in import timm as stand_in
from tests.tiny import ROOT, write_config

NETWORK = {"name": "timm_unet", "backbone": "small", "width": 4, "norm": "batch"}
STAND_IN = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'stand_in'}"  # PYTHONPATH of commands


def trained(kind: str = "small", bands: int = 3) -> dict[str, Tensor]:
    """The state of a whole network, no value of which is one that a fresh network has."""
    generator = torch.Generator().manual_seed(5)
    state = stand_in.create_model(kind, pretrained=False, in_chans=bands).state_dict()
    return {
        name: value + 3 if value.dtype == torch.int64 else 0.1 + torch.rand(value.shape, generator=generator)
        for name, value in state.items()
    }


def written(folder: Path, dataset: Path, file: Path, method: str = "dctc", **network: Any) -> Path:
    values: dict[str, Any] = NETWORK | {"weights": str(file)} | network
    return write_config(folder / "run.yaml", dataset, method, network=values, schedule={"rounds": 3})


def fresh(path: Path, *overrides: str) -> tuple[Method, Any]:
    """The method of a run as it is before its first round, and the run."""
    config = settle(resolve(load_config(path, overrides)), torch.device("cpu"))
    dataset = Dataset.open(config.data.dataset)
    located = locate(config, dataset, Parallel())
    stop = cast(StopRequest, SimpleNamespace(received=None))
    method: Method = prepare(config, dataset, Parallel(), located, stop).keywords["method"]
    return method, located
