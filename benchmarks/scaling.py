"""What limits each strategy: a model of a round's time, checked against two processes here, then asked about more.

    python benchmarks/scaling.py [--out FILE]

1. Latency and bandwidth of gloo between two processes of this machine, fitted to calls of several sizes.
2. Rounds of two processes by each strategy, predicted and measured, for two widths. Nothing is fitted to them. Calls,
   rounds without any exchange and rounds of all strategies take turns in the same two processes.
3. Rounds on 1 to 1,024 GPUs, predicted from assumed numbers (:data:`H100`). None of these is a measurement.

What the model knows of the engine stands in :func:`traffic` and :func:`memory`; docs/scaling.md derives it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Run as a script, this folder is sys.path[0]; the repository's root has to be.
if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
FLOAT, MEBI, BUCKET = 4, 2**20, 50 * 2**20  # bytes of a number; elements of a DeepSpeed bucket
UPDATES, ENCODER_UPDATES = 5, 4
SIZES = [4**power * 1024 for power in range(1, 8)]  # bytes of calls


@dataclass(frozen=True)
class Part:
    """A part: its parameters, the parameter tensors they are in, and the groups that FSDP2 gathers at a time."""

    numbers: int
    tensors: int
    groups: int


@dataclass(frozen=True)
class Parts:
    """Teacher, shared encoder, and a decoder, of which there are two; FLOPs of one forward pass of a tile by each."""

    teacher: Part
    encoder: Part
    decoder: Part
    teacher_flops: float = 0.0
    encoder_flops: float = 0.0
    decoder_flops: float = 0.0
    norm_layers: int = 0  # batch-norm layers of encoder and one decoder

    def stepped(self, what: str) -> int:
        """Parameters (or tensors, groups) of all five updates: T, then E and a decoder four times."""
        teacher, encoder, decoder = (int(getattr(p, what)) for p in (self.teacher, self.encoder, self.decoder))
        return teacher + ENCODER_UPDATES * (encoder + decoder)

    def labelling(self, what: str) -> int:
        """Those of the forward passes that make pseudo-labels: T, then E and both decoders."""
        teacher, encoder, decoder = (int(getattr(p, what)) for p in (self.teacher, self.encoder, self.decoder))
        return teacher + encoder + 2 * decoder

    @property
    def held(self) -> int:
        """All parameters of a run."""
        return self.labelling("numbers")

    @property
    def engines(self) -> list[int]:
        """Parameters of each wrapper that steps in a round, one entry a step."""
        return [self.teacher.numbers] + ENCODER_UPDATES * [self.encoder.numbers, self.decoder.numbers]

    @property
    def flops(self) -> float:
        """Of a round for one labelled and one unlabelled tile: a backward pass counts as two forward ones."""
        forward = self.teacher_flops + self.encoder_flops + 2 * self.decoder_flops
        trained = self.teacher_flops + ENCODER_UPDATES * (self.encoder_flops + self.decoder_flops)
        return forward + 3 * trained


class Call(NamedTuple):
    """Collective calls of a round: their kind, the whole tensors' bytes, how many, and whether work can go on."""

    kind: str
    bytes: float
    messages: float
    hideable: bool = False


def traffic(strategy: str, parts: Parts, sync_norm: bool = False) -> list[Call]:
    """What the ranks exchange in one round (one micro-batch)."""
    if strategy == "none":
        return []
    stepped = FLOAT * parts.stepped("numbers")
    labelling = FLOAT * parts.labelling("numbers")
    buckets = sum(math.ceil(numbers / BUCKET) for numbers in parts.engines)
    norms = len(parts.engines)
    small = [Call("all_reduce", 4 * UPDATES, UPDATES)]  # the counts of pixels
    if sync_norm:  # each layer: all_gather forward, all_reduce backward
        layers = UPDATES * parts.norm_layers
        small += [Call("all_gather", 0, layers), Call("all_reduce", 0, layers)]
    else:
        small += [Call("all_reduce", 0, UPDATES)]  # running statistics
    if strategy == "ddp":
        first = sum(1 + math.ceil(max(0, FLOAT * numbers - MEBI) / (25 * MEBI)) for numbers in parts.engines)
        return [*small, Call("all_reduce", stepped, first, True)]
    if strategy == "fsdp2":
        gathers = 2 * parts.stepped("groups") + parts.labelling("groups")
        scatters = Call("reduce_scatter", stepped, parts.stepped("groups"), True)
        return [*small, Call("all_gather", 2 * stepped + labelling, gathers, True), scatters]
    if strategy in ("zero1", "zero2"):
        return [
            *small, Call("all_reduce", 0, norms), Call("all_reduce", stepped, buckets),
            Call("all_gather", stepped, norms),
        ]  # fmt: skip
    if strategy == "zero3":
        return [
            *small, Call("all_reduce", 0, norms), Call("all_gather", stepped, parts.stepped("tensors")),
            Call("reduce_scatter", stepped, buckets),
        ]  # fmt: skip
    raise ValueError(f"no strategy {strategy!r}: there are none, {', '.join(STRATEGIES)}")


def moved(call: Call, ranks: int) -> float:
    """Bytes that one rank sends for calls, by a ring."""
    return call.bytes * (ranks - 1) / ranks * (2 if call.kind == "all_reduce" else 1)


class Memory(NamedTuple):
    """Bytes of a rank between two updates, at their most, without activations."""

    weights: float
    gradients: float
    moments: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def memory(strategy: str, parts: Parts, ranks: int) -> Memory:
    """What a rank holds. Gradients of a part stay until its next update; moments are Adam's two.

    ZeRO's master copy counts as weights. FSDP2 gathers a group at a time, which is left out; ZeRO-3 keeps a part
    gathered from its forward pass to its step, and all of it after the pseudo-labels (docs/scaling.md).
    """
    held = FLOAT * parts.held
    share = held / ranks
    return {
        "none": Memory(held, held, 2 * held),
        "ddp": Memory(held, held, 2 * held),
        "fsdp2": Memory(share, share, 2 * share),
        "zero1": Memory(held + share, held, 2 * share),
        "zero2": Memory(held + share, share, 2 * share),
        "zero3": Memory(held + 2 * share, share, 2 * share),
    }[strategy]


class Line(NamedTuple):
    """Seconds of a call: ``latency`` each and ``per_byte`` for each byte that a rank sends."""

    latency: float
    per_byte: float


@dataclass(frozen=True)
class Seconds:
    """A predicted round."""

    compute: float
    step: float
    exposed: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.step + self.exposed


def predict(
    strategy: str, calls: Sequence[Call], lines: Mapping[str, Line], ranks: int, compute: float, step: float,
    overlap: float,
) -> Seconds:  # fmt: skip
    """A round of ``compute`` seconds a rank and a ``step`` of all optimizers over all parameters.

    Hideable calls run beside ``overlap`` of the compute; all others and what does not fit there are waited for. Every
    strategy but ddp shares the step out.
    """
    hidden, waited = 0.0, 0.0
    for call in calls:
        line = lines[call.kind]
        seconds = call.messages * line.latency + moved(call, ranks) * line.per_byte
        hidden, waited = (hidden + seconds, waited) if call.hideable else (hidden, waited + seconds)
    shared = strategy not in ("none", "ddp")
    exposed = waited + max(0.0, hidden - overlap * compute)
    return Seconds(compute, step / ranks if shared else step, exposed)


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Latency and seconds a byte from (bytes, seconds), by least squares of relative errors."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(w * (size - x) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    slope = sum(w * (size - x) * (s - y) for w, (size, s) in zip(weights, points, strict=True)) / spread
    return Line(max(0.0, y - slope * x), slope)


@dataclass(frozen=True)
class Gpu:
    """Assumed numbers of a GPU and its links; none is measured. Bandwidths are one way, in bytes/s.

    Attributes:
        flops: what convolutions reach: peak times an assumed share.
        memory: bytes/s that an optimizer step reaches.
        inside, between: bandwidth of a rank inside a machine of ``machine`` GPUs, and between machines.
        latency, hop: seconds of a call inside a machine, and more for each doubling of the machines.
        overlap: share of the compute beside which calls run.
    """

    flops: float
    memory: float
    inside: float
    between: float
    machine: int = 8
    latency: float = 20e-6
    hop: float = 10e-6
    overlap: float = 0.6

    def lines(self, ranks: int) -> dict[str, Line]:
        """Of calls between so many ranks."""
        machines = math.ceil(ranks / self.machine)
        latency = self.latency + (self.hop * (1 + math.log2(machines)) if machines > 1 else 0)
        line = Line(latency, 1 / (self.between if machines > 1 else self.inside))
        return dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), line)


# Data sheets: H100 SXM 989 TFLOP/s in dense bf16 and 3.35 TB/s of memory, NVLink 900 GB/s both ways together, one NDR
# InfiniBand port of 400 Gb/s a GPU. Assumed shares: 25 % of peak for these convolutions, 80 % of every bandwidth.
H100 = Gpu(flops=0.25 * 989e12, memory=0.8 * 3.35e12, inside=0.8 * 450e9, between=0.8 * 50e9)
ADAM_BYTES = 7 * FLOAT  # a parameter's: gradient, weight and moments read, the last three written
# 1 B parameters, as a transformer on 16 px patches of 512 px: 1,024 tokens, 2 FLOPs each and parameter; no batch norm.
BILLION = Parts(
    Part(1_050_000_000, 500, 41), Part(1_000_000_000, 480, 40), Part(50_000_000, 34, 5),
    2 * 1.05e9 * 1024, 2 * 1e9 * 1024, 2 * 5e7 * 1024,
)  # fmt: skip


def on_gpus(strategy: str, parts: Parts, gpus: int, tiles: float, gpu: Gpu = H100) -> Seconds:
    """A round with ``tiles`` labelled and as many unlabelled tiles on each of ``gpus``."""
    chosen = "none" if gpus == 1 else strategy
    step = ADAM_BYTES * parts.stepped("numbers") / gpu.memory
    calls = traffic(chosen, parts, sync_norm=parts.norm_layers > 0)
    return predict(chosen, calls, gpu.lines(gpus), gpus, tiles * parts.flops / gpu.flops, step, gpu.overlap)


def unet(width: int, side: int) -> Parts:
    """The shipped U-Net, counted on no device."""
    from torch.utils.flop_counter import FlopCounterMode

    from dctc.networks import NetworkSpec, build_decoder, build_encoder, build_network
    from dctc.networks.block import Block

    spec = NetworkSpec(3, 6, "unet", width)
    with torch.device("meta"):
        nets = {"teacher": build_network(spec, True), "encoder": build_encoder(spec), "decoder": build_decoder(spec)}
        images = torch.empty(1, 3, side, side)
    features = nets["encoder"](images)
    parts, flops = [], []
    for name, net in nets.items():
        arguments = (features, (side, side)) if name == "decoder" else (images,)
        with FlopCounterMode(display=False) as counter:
            net(*arguments)
        flops.append(float(counter.get_total_flops()))
        blocks = [block for block in net.modules() if isinstance(block, Block)]
        inside = {id(p) for block in blocks for p in block.parameters()}
        parameters = list(net.parameters())
        rest = any(id(p) not in inside for p in parameters)  # then the whole part is a group, too
        parts.append(Part(sum(p.numel() for p in parameters), len(parameters), len(blocks) + rest))
    layers = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in nets["teacher"].modules())
    return Parts(parts[0], parts[1], parts[2], flops[0], flops[1], flops[2], norm_layers=layers)


class Turns:
    """One of two processes, which runs everything in turn, so that other work on the machine meets all of it alike.

    Attributes:
        seconds: name -> seconds of each turn, of the slower rank.
    """

    def __init__(self, width: int, sides: int, tiles: int) -> None:
        from dctc.engine import zero
        from dctc.engine.parallel import ZERO, Parallel
        from dctc.engine.precision import Precision
        from dctc.engine.update import OptimizerSpec, Updater
        from dctc.methods import build_method
        from dctc.methods.base import Batch
        from dctc.networks import NetworkSpec

        torch.set_num_threads(1)
        self.group = Parallel("ddp")
        self.seconds: dict[str, list[float]] = {}
        images, valid = torch.randn(tiles, 3, sides, sides), torch.ones(tiles, sides, sides, dtype=torch.bool)
        self.batches = [Batch(images, valid, torch.randint(6, (tiles, sides, sides)))], [Batch(images, valid)]
        self.precision = Precision("fp32", self.group.device)
        self.loops: dict[str, tuple[Any, Updater]] = {}
        for name in ("none", *STRATEGIES):
            parallel = copy.copy(self.group)
            parallel.strategy = name
            if name == "none":
                parallel.world = 1
            if name in ZERO:
                parallel._zero_settings = zero.default_settings(ZERO[name])
            torch.manual_seed(0)
            method = build_method("dctc", NetworkSpec(3, 6, "unet", width), {})
            updater = Updater(method.parts, OptimizerSpec(), parallel, self.precision)
            method.parts.update(updater.modules)
            self.loops[name] = method, updater
        self.calls: dict[str, Callable[[], object]] = {}
        for size in SIZES:
            whole, half = torch.ones(size // FLOAT), torch.ones(size // FLOAT // 2)
            self.calls[f"all_reduce {size}"] = partial(dist.all_reduce, whole)
            self.calls[f"all_gather {size}"] = partial(dist.all_gather_into_tensor, whole, half)
            self.calls[f"reduce_scatter {size}"] = partial(dist.reduce_scatter_tensor, half, whole)

    def timed(self, name: str, task: Callable[[], object]) -> None:
        """Run a task on both ranks at once and keep the time of the slower one."""
        self.group.wait()
        start = time.perf_counter()
        task()
        self.seconds.setdefault(name, []).append(max(self.group.gather(time.perf_counter() - start)))

    def round(self, name: str) -> None:
        """The updates of a round, as the trainer runs them."""
        from dctc.methods.base import updates

        method, updater = self.loops[name]
        for update in updates(method.round(*self.batches, 0)):
            updater(update)

    def steps(self) -> None:
        """The optimizers' steps of a round."""
        parts = self.loops["none"][1].parts
        for name in ("teacher", *("encoder", "s1", "encoder", "s2") * 2):
            parts[name].step(1e-6)

    def run(self, turns: int) -> dict[str, float]:
        """Medians, without the first turns."""
        for _ in range(turns + 2):
            for name in self.loops:
                self.timed(name, partial(self.round, name))
            self.timed("steps", self.steps)
            for name, call in self.calls.items():
                for _ in range(5):
                    self.timed(name, call)
        return {name: statistics.median(found[len(found) // (turns + 2) * 2 :]) for name, found in self.seconds.items()}


def turns(rank: int, port: int, width: int, number: int, out: str) -> None:
    """The two processes of :class:`Turns`; rank 0 writes the medians."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    warnings.filterwarnings("ignore")
    both = Turns(width, 64, 2)
    found = both.run(number)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    both.group.close()


def check(folder: Path, emit: Any, widths: Sequence[int], number: int) -> None:
    """Predicted and measured rounds of two processes."""
    for width in widths:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = folder / f"{width}.json"
        spawn(turns, (port, width, number, str(out)), nprocs=2)  # type: ignore[no-untyped-call]  # has no types
        found = json.loads(out.read_text())
        emit(f"\n{'gloo, two processes':22}{'latency, us':>12}{'GB/s sent':>12}   microseconds by KiB sent")
        lines = {}
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            points = [(moved(Call(kind, size, 1), 2), found[f"{kind} {size}"]) for size in SIZES]
            lines[kind] = line = fit(points)
            shown = " ".join(f"{size / 1024:.0f}:{1e6 * seconds:.0f}" for size, seconds in points)
            emit(f"{kind:22}{1e6 * line.latency:12.0f}{1e-9 / line.per_byte:12.2f}   {shown}")
        parts, step = unet(width, 64), found["steps"]
        compute = found["none"] - step
        emit(f"\nwidth {width}, 64 px, 4+4 tiles on two processes, medians of {number} turns")
        emit(f"without any exchange, 2+2 tiles on each: compute {compute:.3f} s, optimizer steps {step:.3f} s")
        emit(f"{'strategy':10}{'MB sent':>9}{'calls':>7}{'predicted s':>13}{'measured s':>12}{'error':>8}")
        for name in STRATEGIES:
            calls, measured = traffic(name, parts), found[name]
            predicted = predict(name, calls, lines, 2, compute, step, overlap=0.0).total
            emit(
                f"{name:10}{sum(moved(c, 2) for c in calls) / 1e6:9.1f}{sum(c.messages for c in calls):7.0f}"
                f"{predicted:13.3f}{measured:12.3f}{predicted / measured - 1:+8.0%}"
            )


def foretell(emit: Any) -> None:
    """The tables for many GPUs."""
    emit("\nPREDICTIONS from assumed numbers, nothing below is measured: rounds/s (share of the round that computes)")
    emit(f"assumed: {H100}")
    for title, parts, fixed in (
        ("U-Net of width 64, 512 px, 4+4 tiles in all", unet(64, 512), True),
        ("U-Net of width 64, 512 px, 4+4 tiles a GPU", unet(64, 512), False),
        ("backbone of 1 B parameters, 512 px, 4+4 tiles a GPU", BILLION, False),
    ):
        emit(f"\n{title}\n{'GPUs':>6}" + "".join(f"{name:>16}" for name in STRATEGIES))
        for gpus in (1, 2, 4) if fixed else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            found = [on_gpus(name, parts, gpus, 4 / gpus if fixed else 4) for name in STRATEGIES]
            emit(f"{gpus:6}" + "".join(f"{f'{1 / s.total:.2f} ({s.compute / s.total:.0%})':>16}" for s in found))
        emit(f"{'GiB a GPU without activations, at 8':>40}")
        emit(f"{'':6}" + "".join(f"{memory(name, parts, 8).total / 2**30:16.2f}" for name in STRATEGIES))
    slower = replace(H100, between=H100.between / 8)
    emit("\nOne InfiniBand port for 8 GPUs instead of one each, 64 GPUs, 4+4 tiles a GPU:")
    for title, parts in (("U-Net", unet(64, 512)), ("1 B", BILLION)):
        found = [on_gpus(name, parts, 64, 4, slower) for name in STRATEGIES]
        emit(f"{title:6}" + "".join(f"{f'{1 / s.total:.2f} ({s.compute / s.total:.0%})':>16}" for s in found))


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="What limits each strategy")
    parser.add_argument("--rounds", type=int, default=15, help="turns of two processes")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--predict", action="store_true", help="the tables for many GPUs alone")
    parser.add_argument("--out", type=Path, help="write what is printed into this file, too")
    options = parser.parse_args()
    from benchmarks.sharding import Report

    emit = Report()
    emit(f"command: python benchmarks/scaling.py {' '.join(sys.argv[1:])}".rstrip())
    load = f"load {os.getloadavg()[0]:.1f}"
    emit(f"date {time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), {load}")
    emit(f"Python {platform.python_version()}, torch {torch.__version__}; one thread a process")
    if not options.predict:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder), emit, options.widths, options.rounds)
        emit(f"load {os.getloadavg()[0]:.1f} at the end")
    foretell(emit)
    if options.out is not None:
        options.out.write_text("\n".join(emit.lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
