"""What the parts of `benchmarks.gpu` share: rounds by the engine and by a plain loop, made batches, clocks, the report.

:class:`Engine` is the one place that knows how the engine is set up (precision, layout, compiling, wrapping).
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from dctc.engine.parallel import Parallel
from dctc.engine.precision import Precision
from dctc.engine.update import Losses, OptimizerSpec, Updater
from dctc.methods import Batch, Update, build_method
from dctc.methods.base import IGNORE, updates
from dctc.networks import NetworkSpec
from shards.errors import InputError

SEED = 7
SHARPENING = 0.5  # T of the paper's preset
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """How a round is computed; ``compiler`` is a backend of torch.compile, None for eager."""

    dtype: str = "fp32"
    channels_last: bool = False
    compiler: str | None = None

    def __str__(self) -> str:
        words = [self.dtype, "channels_last" if self.channels_last else "", "compiled" if self.compiler else ""]
        return " ".join(filter(None, words))


class Unavailable(Exception):
    """This version of the engine has no such setting."""


class Engine:
    """A method, its optimizers and its rounds, put together as ``dctc.engine.build`` and the trainer do.

    Neither can be imported without the data path (pydantic, zlib-ng, rasterio).
    """

    def __init__(self, method: str, spec: NetworkSpec, setting: Setting, parallel: Parallel, seed: int = SEED) -> None:
        try:
            self.precision = Precision(setting.dtype, parallel.device, setting.channels_last)
        except (KeyError, ValueError, InputError) as error:
            raise Unavailable(f"precision {setting.dtype} is not available in this version") from error
        torch.manual_seed(seed)
        self.method = build_method(method, spec, {})
        for module in self.method.parts.values():
            self.precision.lay_out(module)
            if setting.compiler is not None:
                module.compile(backend=setting.compiler)
        self.updater = Updater(self.method.parts, OptimizerSpec(), parallel, self.precision)
        self.method.parts.update(self.updater.modules)

    def round(
        self, labelled: Batch, unlabelled: Batch, step: int, watch: Callable[[Update, Losses], None] | None = None
    ) -> list[Losses]:
        """One round as the trainer makes it; ``watch`` is called after each update."""
        steps = updates(self.method.round([self._laid_out(labelled)], [self._laid_out(unlabelled)], step))
        losses: list[Losses] = []
        while True:
            with self.precision.autocast():
                update = next(steps, None)
            if update is None:
                return losses
            losses.append(self.updater(update))
            if watch is not None:
                watch(update, losses[-1])

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Of each net, under autocast; put the parts into evaluation mode before."""
        with self.precision.autocast():
            return self.method.logits(images.contiguous(memory_format=self.precision.memory_format))

    def _laid_out(self, batch: Batch) -> Batch:
        images = batch.images.contiguous(memory_format=self.precision.memory_format)
        return Batch(images, batch.valid, batch.labels)


class PlainLoop:
    """The same rounds as one would write them by hand: eager float32 without TF32, a stock Adam a part.

    It borrows the networks with their initial weights, and no code of the method's or the engine's rounds.
    """

    def __init__(self, method: str, spec: NetworkSpec, device: torch.device) -> None:
        if method not in PLAIN:
            raise Unavailable(f"no plain loop of {method} is written here")
        Precision("fp32", device)  # switches TF32 off, for the whole process
        torch.manual_seed(SEED)
        self.nets = {name: part.to(device).train() for name, part in build_method(method, spec, {}).parts.items()}
        self.optimizers = {name: Adam(net.parameters(), lr=1e-3) for name, net in self.nets.items()}
        self._round = PLAIN[method]

    def round(self, labelled: Batch, unlabelled: Batch, step: int) -> list[Tensor]:
        """The losses of a round in their order."""
        return list(self._round(self, labelled, unlabelled))

    def step(self, names: Sequence[str], logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
        """Cross-entropy, backward and a step on the named nets."""
        loss = F.cross_entropy(logits / temperature, target, ignore_index=IGNORE)
        for name in names:
            self.optimizers[name].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        for name in names:
            self.optimizers[name].step()
        return loss.detach()

    def student(self, name: str, images: Tensor) -> Tensor:
        """Logits of a student."""
        logits: Tensor = self.nets[name](self.nets["encoder"](images), images.shape[-2:])
        return logits

    @contextmanager
    def labelling(self) -> Iterator[None]:
        """All nets in evaluation mode, without gradients."""
        for net in self.nets.values():
            net.eval()
        with torch.no_grad():
            yield
        for net in self.nets.values():
            net.train()


def plain_supervised(loop: PlainLoop, labelled: Batch, unlabelled: Batch) -> Iterator[Tensor]:
    """Cross-entropy on the labelled tiles."""
    yield loop.step(["network"], loop.nets["network"](labelled.images), labelled.required_labels())


def plain_dctc(loop: PlainLoop, labelled: Batch, unlabelled: Batch) -> Iterator[Tensor]:
    """The three phases in turn, the paper's preset."""
    yield loop.step(["teacher"], loop.nets["teacher"](labelled.images), labelled.required_labels())
    x, valid = unlabelled.images, unlabelled.valid
    with loop.labelling():
        taught = torch.where(valid, loop.nets["teacher"](x).argmax(1), IGNORE)
    for name in ("s1", "s2"):
        yield loop.step(["encoder", name], loop.student(name, x), taught, SHARPENING)
    with loop.labelling():
        features = loop.nets["encoder"](x)
        said = {n: torch.where(valid, loop.nets[n](features, x.shape[-2:]).argmax(1), IGNORE) for n in ("s1", "s2")}
    for name, other in (("s1", "s2"), ("s2", "s1")):
        yield loop.step(["encoder", name], loop.student(name, x), said[other], SHARPENING)


PLAIN: Mapping[str, Callable[[PlainLoop, Batch, Batch], Iterator[Tensor]]] = {
    "supervised": plain_supervised,
    "dctc": plain_dctc,
}


def make_batch(spec: NetworkSpec, count: int, tile: int, device: torch.device, number: int, labels: bool) -> Batch:
    """A made batch that can be learnt: classes in patches, each class with a colour; a tenth of the pixels is void."""
    generator = torch.Generator().manual_seed(1000 * SEED + number)
    coarse = torch.randint(0, spec.classes, (count, tile // 8, tile // 8), generator=generator)
    classes = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    colours = torch.randn(spec.classes, spec.bands, generator=torch.Generator().manual_seed(SEED))
    images = colours[classes].movedim(-1, 1) + 0.5 * torch.randn(count, spec.bands, tile, tile, generator=generator)
    valid = torch.rand(count, tile, tile, generator=generator) > 0.1
    images = torch.where(valid[:, None], images, 0.0)
    truth = torch.where(valid, classes, IGNORE).to(device) if labels else None
    return Batch(images.to(device), valid.to(device), truth)


def streams(spec: NetworkSpec, count: int, tile: int, device: torch.device, number: int = 0) -> tuple[Batch, Batch]:
    """A labelled and an unlabelled batch; the same for the same arguments."""
    pair = [make_batch(spec, count, tile, device, 2 * number + k, labels=k == 0) for k in (0, 1)]
    return pair[0], pair[1]


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of a round, and all of the warm-up (compiling among it)."""

    median: float
    warm_up: float


def time_rounds(run: Callable[[int], object], device: torch.device, warm: int, rounds: int, limit: float) -> Timing:
    """Time ``run(step)`` after ``warm`` calls: fewer rounds, but at least 3, where they would take over ``limit`` s.

    On a GPU by events, so that the host may run ahead as it does in training.
    """
    start = last = time.perf_counter()
    for step in range(warm):
        last = time.perf_counter()
        run(step)
        synchronise(device)
    now = time.perf_counter()
    rounds = max(min(rounds, 3), min(rounds, int(limit / max(now - last, 1e-9))))
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]  # type: ignore[no-untyped-call]  # no types
        marks[0].record()
        for step, mark in enumerate(marks[1:]):
            run(warm + step)
            mark.record()
        synchronise(device)
        seconds = [one.elapsed_time(other) / 1000 for one, other in pairwise(marks)]
    else:
        ticks = [time.perf_counter()]
        for step in range(rounds):
            run(warm + step)
            ticks.append(time.perf_counter())
        seconds = [other - one for one, other in pairwise(ticks)]
    return Timing(statistics.median(seconds), now - start)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Begin with an empty cache; afterwards the list holds the GiB that tensors took at most (nothing on a CPU)."""
    found: list[float] = []
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device) / GIB)


def device_name(device: torch.device) -> str:
    """As torch names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"


def net_weights(parts: Mapping[str, nn.Module]) -> Tensor:
    """All weights in one vector, copied."""
    return torch.cat([p.detach().flatten() for part in parts.values() for p in part.parameters()]).cpu()


class Deadline:
    """Minutes that a part may take."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds; negative afterwards."""
        return self._end - time.monotonic()


class Report:
    """Prints each line as it comes and appends it to a file, so that a run that is cut off leaves what it found."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")
