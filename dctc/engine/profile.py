"""A trace of some rounds, on demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Profile:
    """Records the rounds of ``rounds`` (from 1, as the log counts them) into one file a rank.

    Args:
        rounds: None for no trace.
        folder: gets ``rank-0-rounds-10-12.json.gz``, for Perfetto or chrome://tracing.
    """

    def __init__(self, rounds: range | None, folder: Path, rank: int) -> None:
        self._rounds, self._folder, self._rank = rounds, folder, rank
        self._profiler: profile | None = None

    @contextmanager
    def round(self, step: int) -> Iterator[None]:
        """Around round ``step`` (from 0)."""
        if self._rounds is None or step + 1 not in self._rounds:
            yield
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profiler.start()
            self._from = step + 1
        with torch.profiler.record_function(f"round {step + 1}"):
            yield
        if step + 2 not in self._rounds:
            self._finish(step + 1)

    def _finish(self, last: int) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank}-rounds-{self._from}-{last}"
        draft = self._folder / f".{name}.tmp.json.gz"
        self._profiler.export_chrome_trace(str(draft))
        draft.replace(self._folder / f"{name}.json.gz")
        self._profiler = None
