"""Part `speed` of `benchmarks.gpu`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, cast

import torch

from benchmarks.gpu_engine import (
    Deadline,
    Engine,
    PlainLoop,
    Report,
    Setting,
    Timing,
    Unavailable,
    device_name,
    peak_memory,
    streams,
    time_rounds,
)
from dctc.engine.flops import TERA, peak_flops, round_flops
from dctc.engine.parallel import Parallel
from dctc.methods import Batch, build_method
from dctc.networks import NetworkSpec

BANDS, CLASSES = 3, 6
WARM, ROUNDS, LIMIT = 3, 20, 10.0  # rounds before, rounds timed, seconds that they may take
LARGER = (2, 4)  # batches, as multiples of the base
PLAIN = "plain loop, fp32"
HEADER = (
    f"{'method':12}{'network':10}{'setting':28}{'tiles':>8}{'ms':>10}{'images/s':>10}{'x plain':>9}{'TFLOP/s':>9}"
    f"{'MFU %':>7}{'GiB':>7}{'warm-up s':>11}"
)


@dataclass(frozen=True)
class Case:
    """A line of the table; ``setting`` None is the plain loop."""

    method: str
    network: str
    setting: Setting | None
    batch: int

    @property
    def title(self) -> str:
        """The line's first columns."""
        setting = PLAIN if self.setting is None else str(self.setting)
        return f"{self.method:12}{self.network:10}{setting:28}{f'{self.batch}+{self.batch}':>8}"


def settings(quick: bool) -> list[tuple[Setting | None, int]]:
    """Settings and multiples of the batch, what matters most first."""
    compiler = "eager" if quick else "inductor"
    first: list[Setting | None] = [None, Setting("fp32"), Setting("bf16", True), Setting("bf16", True, compiler)]
    second = [Setting("tf32", True), Setting("fp16", True), Setting("bf16"), Setting("tf32"), Setting("fp16")]
    if quick:
        return [*((s, 1) for s in first + second), (None, 2), (Setting("bf16", True), 2)]
    larger = [(s, n) for n in LARGER for s in (None, Setting("bf16", True))]
    larger += [(Setting("bf16", True, compiler), n) for n in LARGER]
    last = [Setting("fp32", True)] + [Setting(dtype, True, compiler) for dtype in ("tf32", "fp16", "fp32")]
    return [*((s, 1) for s in first), *((s, 1) for s in second), *larger, *((s, 1) for s in last)]


@dataclass
class Speed:
    """Measures cases and remembers what later ones are compared with."""

    options: argparse.Namespace
    parallel: Parallel
    emit: Report
    plain: dict[tuple[str, str, int], float] = field(default_factory=dict)  # images a second
    flops: dict[tuple[str, str, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        quick = self.options.quick
        self.width = self.options.width or (4 if quick else 64)
        self.tile = self.options.tile or (32 if quick else 512)
        self.warm, self.rounds = (1, 3) if quick else (WARM, ROUNDS)

    def line(self, case: Case) -> bool:
        """Measure and write one case; False when it failed for a reason other than memory."""
        device = self.parallel.device
        spec = NetworkSpec(BANDS, CLASSES, name=case.network, width=self.width)
        try:
            with peak_memory(device) as memory:
                timing = self._time(case, spec, device)
        except Unavailable as reason:
            self.emit(f"{case.title}  {reason}")
        except torch.OutOfMemoryError:
            self.emit(f"{case.title}  out of memory")
        except Exception as error:  # a compiler that cannot is a result, too
            self.emit(f"{case.title}  FAILED: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            return False
        else:
            self.emit(case.title + self._figures(case, spec, timing, memory))
        return True

    def _time(self, case: Case, spec: NetworkSpec, device: torch.device) -> Timing:
        labelled, unlabelled = streams(spec, case.batch, self.tile, device)
        step: Callable[[Batch, Batch, int], object]
        if case.setting is None:
            step = PlainLoop(case.method, spec, device).round
        else:
            step = Engine(case.method, spec, case.setting, self.parallel).round
        return time_rounds(lambda number: step(labelled, unlabelled, number), device, self.warm, self.rounds, LIMIT)

    def _figures(self, case: Case, spec: NetworkSpec, timing: Timing, memory: list[float]) -> str:
        key = (case.method, case.network, case.batch)
        if key not in self.flops:
            self.flops[key] = round_flops(case.method, spec, {}, case.batch, case.batch, self.tile)
        both = build_method(case.method, NetworkSpec(1, 2, width=1), {}).uses_unlabelled
        pace = case.batch * (2 if both else 1) / timing.median
        if case.setting is None:
            self.plain[key] = pace
        ratio = f"{pace / self.plain[key]:9.2f}" if key in self.plain else f"{'-':>9}"
        done = self.flops[key] / timing.median
        dtype = "fp32" if case.setting is None else case.setting.dtype
        peak = peak_flops(device_name(self.parallel.device), cast(Literal["fp32", "tf32", "bf16", "fp16"], dtype))
        mfu = f"{'-':>7}" if peak is None else f"{100 * done / peak:7.1f}"
        taken = f"{memory[0]:7.2f}" if memory else f"{'-':>7}"
        return f"{1000 * timing.median:10.2f}{pace:10.1f}{ratio}{done / TERA:9.3f}{mfu}{taken}{timing.warm_up:11.1f}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All lines, in their order."""
    base = options.batch or (2 if options.quick else 4)
    for setting, multiple in settings(options.quick):
        for network in options.networks:
            for method in options.methods:
                yield Case(method, network, setting, base * multiple)


def run(options: argparse.Namespace, parallel: Parallel, deadline: Deadline, emit: Report) -> bool:
    """The table."""
    speed = Speed(options, parallel, emit)
    emit(
        f"width {speed.width}, {speed.tile} px, {BANDS} bands, {CLASSES} classes; medians of up to {speed.rounds} "
        f"rounds after {speed.warm}; tiles labelled+unlabelled; images/s of the streams that a method reads"
    )
    if options.quick:
        emit("quick: compiled means graphs captured (dynamo), not made faster (inductor)")
    emit(HEADER)
    good, left = True, 0
    for case in cases(options):
        if deadline.left > 0:
            good &= speed.line(case)
        else:
            left += 1
    emit(f"{left} lines not measured: out of time" if left else "all lines measured")
    return good
