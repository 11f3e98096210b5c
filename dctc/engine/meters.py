"""What the log shows between two log steps, without a host sync in between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dctc.engine.flops import RunFlops
from dctc.engine.parallel import Parallel
from dctc.engine.update import Losses
from dctc.evaluation.evaluate import peak_memory_gib

SLOW = 1.5  # a rank whose own work takes this much longer than the median rank's ...
IN_A_ROW = 5  # ... in as many reads one after the other is a straggler


@dataclass(frozen=True)
class Compute:
    """What MFU is made of.

    Attributes:
        flops: floating-point operations of the rounds, forward and backward, nothing counted twice.
        peak: of one device in FLOP/s, None where it is not known.
    """

    flops: RunFlops
    peak: float | None


@dataclass
class Meters:
    """Sums losses on the device and time on the host; :meth:`read` reduces them over the ranks and starts anew.

    Attributes:
        tiles_per_round: tiles of the global batch of both streams.
        compute: for MFU.
        straggler: rank, host, seconds of its own work a round and the median rank's, when the last read showed one.
    """

    parallel: Parallel
    tiles_per_round: int
    compute: Compute | None = None
    rounds: int = 0
    waited: float = 0.0
    worked: float = 0.0
    skipped: int = 0
    operations: float = 0.0
    straggler: tuple[int, str, float, float] | None = None
    started: float = field(default_factory=time.perf_counter)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _norms: dict[str, list[Tensor]] = field(default_factory=dict)
    _slow: list[int] = field(default_factory=list)
    _seen: list[tuple[int, Losses]] = field(default_factory=list)

    def add(self, step: int, losses: Sequence[Losses], waited: float) -> None:
        """One round: its updates' losses and the seconds that it waited for data."""
        self.rounds += 1
        self.waited += waited
        self.operations += 0.0 if self.compute is None else self.compute.flops.at(step)
        for update in losses:
            self._seen.append((step, update))
            for part, norm in update.norms.items():
                self._norms.setdefault(part, []).append(norm)
            if update.skipped:
                self.skipped += 1
                continue
            for term, share in zip(update.terms, update.shares.unbind(), strict=True):
                self._sums[term] = self._sums[term] + share if term in self._sums else share
                self._counts[term] = self._counts.get(term, 0) + 1

    def nonfinite(self) -> tuple[int, list[str]] | None:
        """Round and terms of the first update since the last call whose losses on this rank are not finite.

        It waits for the device. Updates that were skipped count, too.
        """
        seen, self._seen = self._seen, []
        if not seen or torch.isfinite(torch.cat([losses.shares for _, losses in seen])).all():
            return None
        for step, losses in seen:
            bad = [t for t, finite in zip(losses.terms, losses.shares.isfinite().tolist(), strict=True) if not finite]
            if bad:
                return step, bad
        raise AssertionError("a sum of finite parts")  # pragma: no cover

    def read(self, rate: float) -> dict[str, float]:
        """Metrics since the last read, the same on all ranks; all ranks must call it."""
        terms = [term for term in self._sums if self._counts[term]]
        totals = self.parallel.sum(torch.stack([self._sums[t] for t in terms])).tolist() if terms else []
        seconds = time.perf_counter() - self.started
        metrics = {f"train/loss/{t}": total / self._counts[t] for t, total in zip(terms, totals, strict=True)}
        for part, norms in self._norms.items():
            metrics[f"train/grad_norm/{part}"] = torch.stack(norms).mean().item()
        metrics |= {
            "train/lr": rate,
            "perf/rounds_per_s": self.rounds / seconds,
            "perf/tiles_per_s": self.rounds * self.tiles_per_round / seconds,
        }
        metrics |= self._of_all_ranks(seconds)
        if self.skipped:
            metrics["train/skipped_updates"] = self.skipped
        if self.compute is not None:
            rate_of_all = self.operations / seconds
            metrics["perf/tflops"] = rate_of_all / 1e12
            if self.compute.peak is not None:
                metrics["perf/mfu"] = rate_of_all / (self.compute.peak * self.parallel.world)
        self.rounds, self.waited, self.worked, self.skipped, self.operations = 0, 0.0, 0.0, 0, 0.0
        self.started = time.perf_counter()
        for memory in (self._sums, self._counts, self._norms):
            memory.clear()
        return metrics

    def _of_all_ranks(self, seconds: float) -> dict[str, float]:
        """Data wait, memory and speed, where one slow or full rank counts for all.

        ``worked`` is the time of forward passes in one round: it contains no waiting for other ranks, which the time
        of a whole round hides.
        """
        device = self.parallel.device
        retries = 0
        if device.type == "cuda":
            retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        own = (self.waited / max(1, self.rounds), self.worked, self.waited / seconds, peak_memory_gib(device), retries)
        ranks = self.parallel.gather(own)
        metrics = {
            "perf/data_wait_share": statistics.fmean(rank[2] for rank in ranks),
            "perf/peak_memory_gib": max(rank[3] for rank in ranks),
        }
        if device.type == "cuda":
            metrics["perf/alloc_retries"] = float(sum(rank[4] for rank in ranks))
        if self.parallel.world > 1:
            busy = [waited + worked for waited, worked, *_ in ranks]
            slowest, middle = max(range(len(busy)), key=busy.__getitem__), statistics.median_low(busy)
            metrics |= {
                "perf/slowest_rank": float(slowest),
                "perf/slowest_over_median": busy[slowest] / (middle or 1.0),
            }
            self._slow = [*self._slow[1 - IN_A_ROW :], slowest if busy[slowest] > SLOW * middle else -1]
            if self._slow == [slowest] * IN_A_ROW:
                self.straggler = (slowest, self.parallel.hosts[slowest], busy[slowest], middle)
                self._slow.clear()
            else:
                self.straggler = None
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (validation, pictures) does not count as training."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started
