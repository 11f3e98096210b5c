"""Runs compared by their weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def folder_of(config: Path) -> Path:
    """The run's folder of a config that ``tests.tiny.write_config`` wrote."""
    return config.parent / "runs" / "synthetic-scene" / config.stem


def assert_same_weights(one: Path, other: Path) -> None:
    """Both runs are finished, and every tensor of their models is equal to the bit."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def complete_checkpoints(folder: Path) -> list[str]:
    """Names of the complete checkpoints of a run, oldest first; the run has no half-written one that counts."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step-????????"))
