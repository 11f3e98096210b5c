"""What the log is made of: losses, norms, speed, MFU, stragglers; where a loss was not finite; traces of rounds."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dctc.engine.clock import ForwardClock
from dctc.engine.flops import RunFlops
from dctc.engine.meters import IN_A_ROW, Compute, Meters
from dctc.engine.parallel import Parallel
from dctc.engine.profile import Profile
from dctc.engine.update import Losses
from dctc.methods.base import updates
from tests.golden.rounds import ADAM, batches, built, updater


def losses(*values: float, skipped: bool = False, **norms: float) -> Losses:
    terms = tuple("abcdefg"[: len(values)])
    return Losses(terms, torch.tensor(values), {k: torch.tensor(v) for k, v in norms.items()}, skipped)


def test_means_of_losses_and_norms_leave_out_what_was_skipped() -> None:
    meters = Meters(Parallel(), tiles_per_round=8)
    meters.add(0, [losses(1.0, 2.0, encoder=3.0)], waited=0.0)
    meters.add(1, [losses(3.0, 4.0, encoder=5.0)], waited=0.0)
    meters.add(2, [losses(math.nan, 1.0, skipped=True)], waited=0.0)
    read = meters.read(0.1)
    assert (read["train/loss/a"], read["train/loss/b"]) == (2.0, 3.0)
    assert read["train/grad_norm/encoder"] == 4.0
    assert read["train/skipped_updates"] == 1
    assert read["train/lr"] == 0.1
    meters.add(3, [losses(7.0)], waited=0.0)
    assert meters.read(0.1)["train/loss/a"] == 7.0


def test_speed_wait_and_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    compute = Compute(RunFlops({0: 2e12, 1: 6e12, 3: 10e12}, rounds=9), peak=30e12)
    meters = Meters(Parallel(), tiles_per_round=8, compute=compute, started=100.0)
    for step in range(4):
        meters.add(step, [losses(1.0)], waited=0.25)
    with meters.paused():
        now[0] += 50.0  # a validation
    now[0] += 2.0
    read = meters.read(0.1)
    assert read["perf/rounds_per_s"] == pytest.approx(2.0)
    assert read["perf/tiles_per_s"] == pytest.approx(16.0)
    assert read["perf/data_wait_share"] == pytest.approx(0.5)
    assert read["perf/tflops"] == pytest.approx(12.0)  # rounds 0 to 3 in 2 s
    assert read["perf/mfu"] == pytest.approx(12 / 30)
    assert "perf/mfu" not in Meters(Parallel(), 8, compute=Compute(compute.flops, None)).read(0.1)
    assert compute.flops.mean == pytest.approx((1 * 2e12 + 2 * 6e12 + 6 * 10e12) / 9)


def test_the_first_loss_that_is_not_finite_is_found() -> None:
    meters = Meters(Parallel(), tiles_per_round=8)
    meters.add(4, [losses(1.0, 2.0), losses(3.0)], waited=0.0)
    assert meters.nonfinite() is None
    meters.add(5, [losses(1.0, 2.0)], waited=0.0)
    meters.add(6, [losses(1.0, 2.0), losses(math.inf)], waited=0.0)
    meters.add(7, [losses(math.nan, math.nan)], waited=0.0)
    assert meters.nonfinite() == (6, ["a"])
    assert meters.nonfinite() is None, "told once"


def fleet(*of_ranks: tuple[float, float, float, float, int]) -> Parallel:
    """Four ranks whose part of the log is given."""
    return cast(
        Parallel,
        SimpleNamespace(
            world=len(of_ranks), device=torch.device("cpu"), hosts=[f"n{i}" for i in range(len(of_ranks))],
            gather=lambda _: list(of_ranks), sum=lambda tensor: tensor,
        ),
    )  # fmt: skip


def test_a_straggler_is_one_whose_own_work_takes_longer_for_some_time() -> None:
    fast, slow = (0.1, 0.1, 0.2, 1.0, 0), (0.1, 0.9, 0.3, 2.0, 0)
    meters = Meters(fleet(fast, fast, slow, fast), tiles_per_round=8)
    for read in range(IN_A_ROW):
        assert meters.straggler is None
        meters.add(read, [losses(1.0)], waited=0.0)
        values = meters.read(0.1)
    assert meters.straggler == (2, "n2", 1.0, 0.2)
    assert values["perf/slowest_rank"] == 2
    assert values["perf/slowest_over_median"] == pytest.approx(5.0)
    assert values["perf/peak_memory_gib"] == 2.0, "the fullest rank counts"
    assert values["perf/data_wait_share"] == pytest.approx(0.225)


def test_ranks_that_are_slow_in_turn_are_no_stragglers() -> None:
    fast, slow = (0.1, 0.1, 0.2, 1.0, 0), (0.1, 0.9, 0.3, 1.0, 0)
    reads: list[Any] = [(slow, fast, fast), (fast, slow, fast)] * IN_A_ROW
    meters = Meters(fleet(*reads[0]), tiles_per_round=8)
    for step, ranks in enumerate(reads):
        meters.parallel = fleet(*ranks)
        meters.add(step, [losses(1.0)], waited=0.0)
        meters.read(0.1)
        assert meters.straggler is None


def test_norms_and_forward_time_are_measured_when_asked_for() -> None:
    method = built("dctc")
    engine = updater(method, ADAM)
    labelled, unlabelled = batches(0)
    for measure in (False, True):
        engine.measure = measure
        norms: dict[str, float] = {}
        for update in updates(method.round([labelled], [unlabelled], 0)):
            norms |= {name: float(norm) for name, norm in engine(update).norms.items()}
        assert set(norms) == (set(method.parts) if measure else set())
        assert (engine.clock.read() > 0) == measure
    for name, module in method.parts.items():  # the gradients of the last update of each part are still there
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        assert norms[name] == pytest.approx(float(gradient.double().norm()), rel=1e-5)


def test_a_clock_starts_anew_when_it_is_read() -> None:
    clock = ForwardClock(torch.device("cpu"))
    with clock.running():
        pass
    assert clock.read() > 0
    assert clock.read() == 0


def test_a_trace_holds_the_rounds_that_were_asked_for(tmp_path: Path) -> None:
    profile = Profile(range(2, 4), tmp_path / "profile", rank=1)
    for step in range(5):
        with profile.round(step):
            torch.ones(3) + 1
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "rank-1-rounds-2-3.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    rounds = {event["name"] for event in events if str(event.get("name", "")).startswith("round ")}
    assert rounds == {"round 2", "round 3"}
