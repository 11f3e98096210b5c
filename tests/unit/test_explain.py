"""Errors that have a remedy, in one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dctc.config import load_config
from dctc.engine.faults import explain
from dctc.engine.parallel import Parallel

NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("could not create a primitive"),  # a convolution in a process whose memory is limited
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_a_full_memory_is_known_in_every_librarys_words(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {dataset: datasets/x}\nmethod: {name: dctc}\n")
    told = explain(error, Parallel(), load_config(path))
    assert told is not None
    assert told.startswith("rank 0: the memory of this machine is full. Try in this order: parallel.accumulation=2 ")
    assert explain(RuntimeError("shapes cannot be multiplied"), Parallel(), load_config(path)) is None
