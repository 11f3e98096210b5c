"""What the log shows between two log steps, without a host sync in between."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dctc.engine.parallel import Parallel
from dctc.engine.update import Losses
from dctc.evaluation.evaluate import peak_memory_gib


@dataclass
class Meters:
    """Sums losses on the device and time on the host; :meth:`read` reduces them over the ranks and starts anew.

    Attributes:
        tiles_per_round: tiles of the global batch of both streams.
    """

    parallel: Parallel
    tiles_per_round: int
    rounds: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, losses: Sequence[Losses], waited: float) -> None:
        """One round: its updates' losses and the seconds that it waited for data."""
        self.rounds += 1
        self.waited += waited
        for update in losses:
            for term, share in zip(update.terms, update.shares.unbind(), strict=True):
                self._sums[term] = self._sums[term] + share if term in self._sums else share
                self._counts[term] = self._counts.get(term, 0) + 1

    def check(self, step: int) -> None:
        """Raise :class:`FloatingPointError` when a loss since the last read is not finite. It waits for the device."""
        bad = [term for term, value in self._sums.items() if not math.isfinite(value.item())]
        if self.parallel.any(bool(bad)):
            raise FloatingPointError(
                f"loss {', '.join(bad) or 'of another rank'} is no longer finite by round {step}: "
                "lower optimizer.lr, set optimizer.clip, or use precision.dtype=fp32"
            )

    def read(self, rate: float) -> dict[str, float]:
        """Metrics since the last read, the same on all ranks; all ranks must call it."""
        terms = list(self._sums)
        totals = self.parallel.sum(torch.stack([self._sums[term] for term in terms])).tolist()
        seconds = time.perf_counter() - self.started
        metrics = {f"train/loss/{t}": total / self._counts[t] for t, total in zip(terms, totals, strict=True)}
        metrics |= {
            "train/lr": rate,
            "perf/rounds_per_s": self.rounds / seconds,
            "perf/tiles_per_s": self.rounds * self.tiles_per_round / seconds,
            "perf/data_wait_share": self.waited / seconds,
            "perf/peak_memory_gib": peak_memory_gib(self.parallel.device),
        }
        self.rounds, self.waited, self.started = 0, 0.0, time.perf_counter()
        self._sums.clear()
        self._counts.clear()
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (validation, pictures) does not count as training."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started
