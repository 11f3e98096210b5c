"""What does the engine cost? Against the same round written out by hand in plain PyTorch.

    python benchmarks/engine.py [--rounds N] [--parts round,run,...] [--out FILE]

The plain loop (`benchmarks.engine_loops.PlainLoop`) has the networks, optimizers and batches of the trainer, and
`loss.backward(); optimizer.step()`; first both must give the same losses to 1e-5. One thread each.

- round: `Trainer.round` and the meters, with a log step every 10 rounds, batches held in memory. CPU seconds of single
  rounds in turn, nine tenths the median of a usual round and one tenth that of a log round. Limit 1.03. The smallest
  size shows the overhead itself: its network is next to nothing.
- run: a whole `Trainer.run` with reading, MLflow (sqlite) and a checkpoint every 50 rounds against the plain loop,
  which reads, logs and saves nothing, 10 rounds of each in turn by the clock. The trainer's threads are waited for and
  counted, though training would go on beside them. Limit 1.05.
- checkpoint: seconds that training is held up, and until the checkpoint is complete on the disk, against `torch.save`
  of the same state, synced, which holds up training to its end.
- memory: the most resident memory of a fresh process above what it has after its imports, with glibc's malloc as it
  is, which depends on the order of calls, and with every large block given back at once. Limit 3 % more.
- pair: two processes of `accelerate launch` on two cores by each strategy against one process on one core. No limit.
- peers: one supervised step in plain PyTorch, accelerate and Lightning Fabric (if it can be imported). No limit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, this folder is sys.path[0]; the repository's root has to be.
if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch

from benchmarks.engine_loops import (
    LOG,
    ROOT,
    Interleaved,
    PlainLoop,
    Size,
    SupervisedLoop,
    TrainerLoop,
    held_batches,
    make_dataset,
    make_trainer,
    pair_speed,
    write_config,
)
from benchmarks.sharding import Report
from dctc.engine.checkpoint import Checkpoints, Progress

LIMIT_ROUND, LIMIT_RUN, LIMIT_MEMORY, EQUAL = 1.03, 1.05, 1.03, 1e-5
PARTS = ("round", "run", "checkpoint", "memory", "pair", "peers")
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
Loop = Callable[..., list[torch.Tensor]]
# glibc keeps freed blocks below a moving threshold, in a heap that fragments by the order of calls. With a fixed one
# large blocks go back to the system, so that the peak is that of what is alive.
MALLOCS: dict[str, dict[str, str]] = {"glibc's malloc": {}, "blocks given back": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        sizes: of rounds and memory, each with its part of ``rounds``.
        run: size of the whole run, its rounds and those between checkpoints.
        widths: of checkpoints.
        pair: size and rounds of two processes.
    """

    rounds: int = 24
    repeats: int = 3
    sizes: tuple[tuple[Size, float], ...] = ((Size(16, 128, 4), 1), (Size(32, 256, 2), 0.4), (Size(4, 32, 1), 4))
    run: tuple[Size, int, int] = (Size(16, 64, 4), 100, 50)
    widths: tuple[int, ...] = (16, 64)
    pair: tuple[Size, int] = (Size(16, 128, 4), 20)


TINY = Plan(
    rounds=2,
    repeats=1,
    sizes=((Size(4, 32, 2), 1),),
    run=(Size(4, 32, 2), 40, 20),
    widths=(4,),
    pair=(Size(4, 32, 2), 6),
)


class Bench:
    """Data and configs in one folder, and the table."""

    def __init__(self, folder: Path, plan: Plan, emit: Report) -> None:
        self.folder, self.plan, self.emit = folder, plan, emit
        self.holds = True
        self._sets: dict[int, Path] = {}

    def config(self, name: str, size: Size, rounds: int, **more: Any) -> Path:
        """A config on a dataset of tiles of this size."""
        if size.side not in self._sets:
            self._sets[size.side] = make_dataset(self.folder / f"{size.side}px", size.side)
        return write_config(self.folder / f"{name}.yaml", self._sets[size.side], size, rounds, **more)

    def head(self, title: str, unit: str, peer: str = "plain") -> None:
        """A new part of the table."""
        self.emit(f"\n{f'{title}, {unit}':52}{'measured':>10}{peer:>10}{'ratio':>8}{'limit':>7}  verdict")

    def row(
        self, name: str, measured: float, peer: float, limit: float | None = None, ratio: float | None = None
    ) -> None:
        """A line; a limit is the largest ratio that holds."""
        ratio = measured / peer if ratio is None else ratio
        self.holds &= limit is None or ratio <= limit
        verdict = "" if limit is None else "holds" if ratio <= limit else "MISSED"
        bound = "" if limit is None else f"{limit:.2f}"
        self.emit(f"{name:52}{measured:10.4g}{peer:10.4g}{ratio:8.3f}{bound:>7}  {verdict}".rstrip())

    def note(self, text: str) -> None:
        """A line of words."""
        self.emit(f"  {text}")


def check_equal(loops: Mapping[str, Loop], batches: Any, rounds: int) -> float:
    """Train all loops some rounds; the largest difference of a loss, which must be below :data:`EQUAL`."""
    worst = 0.0
    for step in range(rounds):
        first, *others = (torch.stack(loop(*batches[step % len(batches)], step, False)) for loop in loops.values())
        worst = max(worst, *(float((losses - first).abs().max()) for losses in others))
    if worst > EQUAL:
        raise SystemExit(f"the loops do not compute the same: losses differ by {worst:.1e}")
    return worst


def in_turn(loops: Mapping[str, Loop], batches: Any, rounds: int, first: int) -> dict[str, tuple[float, float]]:
    """CPU seconds of a usual round and of a log round of each loop: medians of rounds in turn, order reversed in turn.

    There are half as many log rounds as usual ones.
    """
    times: dict[tuple[str, bool], list[float]] = {(name, log): [] for name in loops for log in (False, True)}
    for step in range(rounds + max(1, rounds // 2)):
        log = step % 3 == 2
        order = list(loops.items())[:: -1 if step % 2 else 1]
        for name, loop in order:
            start = time.process_time()
            loop(*batches[step % len(batches)], first + step, log)
            times[name, log].append(time.process_time() - start)
    medians = {key: statistics.median(found) for key, found in times.items() if found}
    return {name: (medians[name, False], medians.get((name, True), medians[name, False])) for name in loops}


def mixed(usual: float, logged: float) -> float:
    """A round of a run that logs every :data:`LOG`-th."""
    return ((LOG - 1) * usual + logged) / LOG


def measure_round(bench: Bench) -> None:
    """Part round."""
    bench.head("one round", "CPU ms")
    for size, share in bench.plan.sizes:
        trainer = make_trainer(bench.config(f"round{size.width}", size, 10_000))
        batches = held_batches(trainer, 2)
        loops: dict[str, Loop] = {"plain": PlainLoop(trainer), "dctc": TrainerLoop(trainer)}
        worst = check_equal(loops, batches, 3)
        times = in_turn(loops, batches, max(2, round(bench.plan.rounds * share)), 3)
        ours, plain = (1000 * mixed(*times[name]) for name in ("dctc", "plain"))
        overhead_only = size.width == 4 and bench.plan is not TINY
        bench.row(str(size), ours, plain, None if overhead_only else LIMIT_ROUND)
        extra = 1000 * (times["dctc"][1] - times["dctc"][0])
        bench.note(
            f"losses differ by {worst:.0e}; overhead {ours - plain:+.2f} ms a round; a log step adds {extra:.2f} ms"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """The trainer's own lines go nowhere."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def measure_run(bench: Bench) -> None:
    """Part run."""
    size, rounds, every = bench.plan.run
    bench.head(f"run of {rounds} rounds", "s by the clock")
    usual: list[tuple[float, float]] = []
    saving: list[tuple[float, float]] = []
    starts, ends = [], []
    for repeat in range(bench.plan.repeats + 1):  # the first makes the database
        config = bench.config(f"run{repeat}", size, rounds if repeat else LOG, checkpoint_every=every)
        start = time.perf_counter()
        trainer = make_trainer(config, "tracking.enabled=true", track=True)
        starts.append(time.perf_counter() - start)
        watched = Interleaved(trainer, PlainLoop(trainer), held_batches(trainer, 2))
        trainer.labelled = watched  # type: ignore[assignment]  # has all of it
        with quiet():
            assert trainer.run()
        watched.measure(trainer.schedule.rounds)
        start = time.perf_counter()
        trainer.tracker.finish("FINISHED")
        ends.append(time.perf_counter() - start)
        if repeat:
            for number, pair in enumerate(watched.pairs, 1):
                (usual if LOG * number % every else saving).append(pair)
    share = LOG / every  # of the stretches that end in a checkpoint
    ratios = [statistics.median(ours / plain for ours, plain in pairs) for pairs in (usual, saving)]
    plain = statistics.median(plain for _, plain in usual + saving) * rounds / LOG
    ratio = (1 - share) * ratios[0] + share * ratios[1]
    bench.row(f"{size}, checkpoint every {every}", ratio * plain, plain, LIMIT_RUN, ratio)
    spread = statistics.quantiles([ours / plain for ours, plain in usual], n=4)
    bench.note(
        f"{LOG} rounds without a checkpoint {ratios[0]:.3f} (quartiles {spread[0]:.3f} and {spread[2]:.3f} of "
        f"{len(usual)}), with one {ratios[1]:.3f} ({len(saving)})"
    )
    bench.note(f"beside it: {starts[-1]:.2f} s to prepare and to open the MLflow run, {ends[-1]:.2f} s to end it")


def measure_checkpoints(bench: Bench) -> None:
    """Part checkpoint."""
    bench.head("checkpoint", "s", "torch.save")
    for width in bench.plan.widths:
        trainer = make_trainer(bench.config(f"checkpoint{width}", Size(width, 32, 1), 10))
        batches = held_batches(trainer, 1)
        TrainerLoop(trainer)(*batches[0], 0, False)
        folder = bench.folder / "checkpoints"
        checkpoints = Checkpoints(folder, 1, trainer.parallel)
        held, whole, peer = [], [], []
        for repeat in range(bench.plan.repeats + 1):
            start = time.perf_counter()
            checkpoints.save(trainer.updater.parts, Progress(rounds=repeat))
            held.append(time.perf_counter() - start)
            checkpoints.wait()
            whole.append(time.perf_counter() - start)
            start = time.perf_counter()
            state = {name: part.state() for name, part in trainer.updater.parts.items()}
            with (bench.folder / "peer.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            peer.append(time.perf_counter() - start)
        megabytes = (bench.folder / "peer.pt").stat().st_size / 1e6
        by_hand = statistics.median(peer[1:])
        bench.row(f"width {width}, {megabytes:.0f} MB: training held up", statistics.median(held[1:]), by_hand)
        bench.row(f"width {width}, {megabytes:.0f} MB: complete on disk", statistics.median(whole[1:]), by_hand)
        shutil.rmtree(folder)


def measure_memory(bench: Bench) -> None:
    """Part memory."""
    bench.head("most resident memory", "MiB above imports")
    for size, _ in bench.plan.sizes[:2]:
        config = bench.config(f"memory{size.width}", size, 100)
        for name, setting in MALLOCS.items():
            found: dict[str, list[list[float]]] = {"plain": [], "trainer": []}
            for _ in range(bench.plan.repeats):
                for kind, values in found.items():
                    command = [sys.executable, "-m", "benchmarks.engine_loops", kind, str(config), "2"]
                    environment = {**os.environ, **setting}
                    done = subprocess.run(
                        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
                    )
                    if done.returncode:
                        raise SystemExit(f"{kind} failed:\n{done.stderr}")
                    values.append(json.loads(done.stdout.splitlines()[-1]))
            above = {kind: statistics.median(peak - start for start, peak in values) for kind, values in found.items()}
            bench.row(f"{size}, {name}", above["trainer"], above["plain"], LIMIT_MEMORY)
            peaks = "; ".join(f"{kind} {' '.join(f'{p:.0f}' for _, p in values)}" for kind, values in found.items())
            bench.note(f"absolute: {peaks}; after imports {found['trainer'][0][0]:.0f}")


def measure_pair(bench: Bench) -> None:
    """Part pair: more is better, so there is no limit in this column."""
    size, rounds = bench.plan.pair
    bench.head(f"two processes, {size}", "rounds/s", "one")
    config = bench.config("pair", size, rounds, log_every=max(1, rounds // 5), checkpoint_every=0)
    speeds: dict[str, list[float]] = {name: [] for name in ("none", *STRATEGIES)}
    for _ in range(max(1, bench.plan.repeats - 1)):
        for name, values in speeds.items():
            values.append(pair_speed(config, name, "run.resume=auto"))
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    for name in STRATEGIES:
        bench.row(name, middle[name], middle["none"])


def measure_peers(bench: Bench) -> None:
    """Part peers."""
    kinds = ["plain", "accelerate"] + ["fabric"] * (importlib.util.find_spec("lightning_fabric") is not None)
    size = bench.plan.sizes[0][0]
    bench.head(f"supervised step, {size.width} wide, {size.tiles} of {size.side} px", "CPU ms")
    trainer = make_trainer(bench.config("peers", size, 10_000, method="supervised"))
    batches = held_batches(trainer, 2)
    loops: dict[str, Loop] = {kind: SupervisedLoop(trainer, kind) for kind in kinds} | {"dctc": TrainerLoop(trainer)}
    check_equal(loops, batches, 3)
    times = in_turn(loops, batches, 2 * bench.plan.rounds, 3)
    plain = 1000 * mixed(*times["plain"])
    for name in (*kinds[1:], "dctc"):
        bench.row(name, 1000 * mixed(*times[name]), plain)
    if "fabric" not in kinds:
        bench.note("Lightning Fabric is not installed here")


MEASURES: dict[str, Callable[[Bench], None]] = {
    "round": measure_round, "run": measure_run, "checkpoint": measure_checkpoints,
    "memory": measure_memory, "pair": measure_pair, "peers": measure_peers,
}  # fmt: skip


def main() -> int:
    """Print the tables; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description="The engine against plain PyTorch")
    parser.add_argument("--rounds", type=int, help="usual rounds of the first size that are timed")
    parser.add_argument("--repeats", type=int, help="repeats of whole runs, checkpoints and processes")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between them")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write what is printed into this file, too")
    options = parser.parse_args()
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    base = TINY if options.tiny else Plan()
    more = {key: value for key in ("rounds", "repeats") if (value := getattr(options, key)) is not None}
    plan = type(base)(**{**vars(base), **more}) if more else base
    torch.set_num_threads(1)
    emit = Report()
    emit(f"command: python benchmarks/engine.py {' '.join(sys.argv[1:])}".rstrip())
    load = " ".join(f"{mean:.1f}" for mean in os.getloadavg())
    emit(
        f"date {time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), load {load} at the start"
    )
    names = ("torch", "accelerate", "deepspeed", "mlflow", "lightning-fabric")
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    emit(f"Python {platform.python_version()}, {', '.join(f'{n} {found[n]}' for n in names if n in found)}; one thread")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), plan, emit)
        for part in wanted:
            MEASURES[part](bench)
    emit(f"\nload {os.getloadavg()[0]:.1f} at the end\n")
    emit("the limits hold" if bench.holds else "SOME LIMITS ARE MISSED")
    if options.out is not None:
        options.out.write_text("\n".join(emit.lines) + "\n")
    return 0 if bench.holds else 1


if __name__ == "__main__":
    sys.exit(main())
