"""The loops that `benchmarks.engine` compares: a round written out by hand, the trainer's, a supervised step of peers.

    python -m benchmarks.engine_loops {plain,trainer} CONFIG ROUNDS

prints the peak memory of a fresh process that runs one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim import Adam

from dctc.config import Config, load_config
from dctc.data.loaders import StreamBatch
from dctc.engine.build import Run, locate, prepare, resolve, settle
from dctc.engine.meters import Meters
from dctc.engine.parallel import Parallel
from dctc.engine.preempt import StopRequest
from dctc.engine.trainer import Tracker, Trainer
from dctc.methods.base import IGNORE, Batch
from dctc.tracking.run import MlflowTracker
from dctc.tracking.start import start_tracking
from shards.manifest import Dataset
from shards.pack import pack
from shards.recipe import load_recipe
from shards.synth import write_scenes

ROOT = Path(__file__).resolve().parents[1]
LOG, LR, TEMPERATURE = 10, 1e-3, 0.5
Losses = list[Tensor]


@dataclass(frozen=True)
class Size:
    """A network's width, the side of its tiles, and tiles of each stream in a round."""

    width: int
    side: int
    tiles: int

    def __str__(self) -> str:
        return f"width {self.width}, {self.side} px, {self.tiles}+{self.tiles}"


def make_dataset(folder: Path, side: int) -> Path:
    """Synthetic towns, packed in tiles of ``side`` px."""
    write_scenes(folder / "scenes", scenes=4, size=4 * side, seed=0)
    recipe = load_recipe(ROOT / "configs" / "data" / "synthetic.yaml", [f"tile.size={side}"])
    pack(recipe, folder / "scenes", folder / "set", workers=1)
    return folder / "set"


def write_config(path: Path, dataset: Path, size: Size, rounds: int, method: str = "dctc", **run: Any) -> Path:
    """A run without validation and pictures, in float32."""
    config = {
        "data": {"dataset": str(dataset), "batch_labelled": size.tiles, "batch_unlabelled": size.tiles},
        "network": {"width": size.width},
        "method": {"name": method},
        "optimizer": {"lr": LR},
        "precision": {"dtype": "fp32"},
        "schedule": {"rounds": rounds, "warmup_epochs": 0},
        "run": {"output": str(path.parent / "runs"), "experiment": "bench", "name": path.stem, "log_every": LOG}
        | {"checkpoint_every": 0, "pictures_every": 0}
        | run,
        "tracking": {"enabled": False},
        "evaluation": {"every": 0, "test": False},
    }
    path.write_text(yaml.safe_dump(config))
    return path


@cache
def alone() -> tuple[Parallel, StopRequest]:
    """This process, made known to accelerate once."""
    return Parallel("none"), StopRequest()


class _Nowhere:
    """A tracker that keeps nothing."""

    run_id = None

    def await_run_id(self) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def picture(self, file: Path, key: str, step: int) -> None: ...
    def artifact(self, file: Path) -> None: ...
    def model(self, file: Path) -> None: ...
    def finish(self, status: str) -> None: ...


def make_trainer(path: Path, *overrides: str, track: bool = False) -> Trainer:
    """The trainer of a config, as ``dctc/train.py`` puts it together; ``track`` opens its own tracker."""
    parallel, stop = alone()
    config, dataset = _opened(path, overrides, parallel)
    run = locate(config, dataset, parallel)
    make = prepare(config, dataset, parallel, run, stop)
    return make(_tracker(config, dataset, run) if track else _Nowhere())


def _opened(path: Path, overrides: Sequence[str], parallel: Parallel) -> tuple[Config, Dataset]:
    config = settle(resolve(load_config(path, overrides)), parallel.device)
    return config, Dataset.open(config.data.dataset, config.data.cache_settings)


def _tracker(config: Config, dataset: Dataset, run: Run) -> Tracker:
    run.folder.mkdir(parents=True, exist_ok=True)
    names = run.experiment, run.name
    return start_tracking(config, dataset, run.folder, names, "none", "s1", run_id=None, resumed_step=None,
        main_process=True)  # fmt: skip


def held_batches(trainer: Trainer, number: int) -> list[tuple[Batch, Batch]]:
    """The first batches of both streams, held in memory; without an unlabelled stream the labelled one twice."""
    sources = [s.batches(range(number), trainer.parallel.device) for s in trainer.streams]
    found = [[Batch(*next(source)[0]) for source in sources] for _ in range(number)]
    return [(pair[0], pair[-1]) for pair in found]


class TrainerLoop:
    """Rounds as the trainer runs them, without reading: ``round``, the meters, and the numbers of each log step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.meters = Meters(trainer.parallel, trainer.tiles_per_round)

    def __call__(self, labelled: Batch, unlabelled: Batch, step: int, log: bool) -> Losses:
        trainer = self.trainer
        rate = trainer.updater.set_rate(trainer.schedule.factor(step))
        trainer.updater.measure = log
        losses = trainer.round([labelled], [unlabelled], step)
        trainer._count_skips(losses)
        self.meters.add(step, losses, 0.0)
        if log:
            assert self.meters.nonfinite() is None
            self.meters.worked = trainer.updater.clock.read()
            self.meters.read(rate)
        return [share for update in losses for share in update.shares.unbind()]


class PlainLoop:
    """The five updates of a round in plain PyTorch, as one would write them by hand.

    It has copies of the trainer's networks, or with ``own`` takes them over.
    """

    def __init__(self, trainer: Trainer, own: bool = False) -> None:
        self.schedule = trainer.schedule
        nets = {name: (net if own else deepcopy(net)).train() for name, net in trainer.updater.modules.items()}
        self.teacher, self.encoder, self.students = nets["teacher"], nets["encoder"], (nets["s1"], nets["s2"])
        self.optimizers = {net: Adam(net.parameters(), lr=LR) for net in nets.values()}
        self.seen: list[Losses] = []

    def __call__(self, labelled: Batch, unlabelled: Batch, step: int, log: bool) -> Losses:
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = LR * self.schedule.factor(step)
        x, size, s1, s2 = unlabelled.images, unlabelled.images.shape[-2:], *self.students
        losses = [self.step(F.cross_entropy, self.teacher, None, labelled.images, labelled.required_labels())]
        self.teacher.eval()
        with torch.no_grad():
            target = self.pseudo(self.teacher(x), unlabelled)
        self.teacher.train()
        losses += [self.step(self.sharp, self.encoder, student, x, target) for student in self.students]
        for net in (self.encoder, *self.students):
            net.eval()
        with torch.no_grad():
            features = self.encoder(x)
            by_s1, by_s2 = (self.pseudo(student(features, size), unlabelled) for student in self.students)
        for net in (self.encoder, *self.students):
            net.train()
        losses += [self.step(self.sharp, self.encoder, s1, x, by_s2), self.step(self.sharp, self.encoder, s2, x, by_s1)]
        self.seen.append(losses)
        if log:
            torch.stack([torch.stack(one) for one in self.seen]).mean(dim=0).tolist()
            self.seen.clear()
        return losses

    def step(self, loss_of: Any, first: nn.Module, second: nn.Module | None, x: Tensor, target: Tensor) -> Tensor:
        """One update of one or two nets in a row."""
        nets = [first] if second is None else [first, second]
        for net in nets:
            self.optimizers[net].zero_grad()
        logits = first(x) if second is None else second(first(x), x.shape[-2:])
        loss: Tensor = loss_of(logits, target, ignore_index=IGNORE)
        loss.backward()  # type: ignore[no-untyped-call]  # has no types
        for net in nets:
            self.optimizers[net].step()
        return loss.detach()

    @staticmethod
    def sharp(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """The cross-entropy of a sharpened prediction."""
        return F.cross_entropy(logits / TEMPERATURE, target, ignore_index=ignore_index)

    @staticmethod
    def pseudo(logits: Tensor, batch: Batch) -> Tensor:
        """The likeliest class, ignored where the image has no data."""
        return torch.where(batch.valid, logits.argmax(dim=1), IGNORE)


class Interleaved:
    """The labelled stream of a trainer, that runs as many rounds of the plain loop after every :data:`LOG` rounds.

    What the trainer left to its threads is waited for before that, on its account: nothing of it runs beside the plain
    loop, and nothing that training could have hidden is hidden.

    Attributes:
        pairs: seconds of the trainer and of the plain loop for each :data:`LOG` rounds, one after the other.
    """

    def __init__(self, trainer: Trainer, plain: PlainLoop, batches: Sequence[tuple[Batch, Batch]]) -> None:
        self._trainer, self._plain, self._batches, self._stream = trainer, plain, batches, trainer.labelled
        self.pairs: list[tuple[float, float]] = []
        self._started = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def batches(self, rounds: range, device: torch.device) -> Iterator[list[StreamBatch]]:
        """What the stream yields."""
        source = self._stream.batches(rounds, device)
        for step in rounds:
            if step % LOG == 0:
                self.measure(step)
            yield next(source)

    def measure(self, step: int) -> None:
        """The end of a stretch of the trainer, and the same stretch of the plain loop."""
        if step:
            tracker = self._trainer.tracker
            assert isinstance(tracker, MlflowTracker)
            assert tracker.flush()
            self._trainer.checkpoints.wait()
            ours = time.perf_counter() - self._started
            start = time.perf_counter()
            for number in range(step - LOG, step):
                self._plain(*self._batches[number % 2], step=number, log=number % LOG == LOG - 1)
            self.pairs.append((ours, time.perf_counter() - start))
        self._started = time.perf_counter()


class SupervisedLoop:
    """A supervised step, as plain PyTorch, accelerate or Lightning Fabric are meant to be used."""

    def __init__(self, trainer: Trainer, kind: str) -> None:
        (module,) = trainer.updater.modules.values()
        net: Any = deepcopy(module).train()
        optimizer: Any = Adam(net.parameters(), lr=LR)
        backward: Callable[[Tensor], Any] = torch.Tensor.backward
        self.around: Callable[[nn.Module], Any] = lambda _: nullcontext()
        if kind == "accelerate":
            from accelerate import Accelerator

            peer = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
            net, optimizer = peer.prepare(net, optimizer)
            backward, self.around = peer.backward, peer.accumulate
        elif kind == "fabric":
            from lightning_fabric import Fabric  # type: ignore[import-not-found]  # a peer, installed for a comparison

            peer = Fabric(accelerator="cpu", devices=1)
            net, optimizer = peer.setup(net, optimizer)
            backward = peer.backward
        self.net, self.optimizer, self.backward, self.schedule = net, optimizer, backward, trainer.schedule
        self.seen: Losses = []

    def __call__(self, labelled: Batch, _: Batch, step: int, log: bool) -> Losses:
        for group in self.optimizer.param_groups:
            group["lr"] = LR * self.schedule.factor(step)
        with self.around(self.net):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.net(labelled.images), labelled.required_labels(), ignore_index=IGNORE)
            self.backward(loss)
            self.optimizer.step()
        self.seen.append(loss.detach())
        if log:
            torch.stack(self.seen).mean().item()
            self.seen.clear()
        return [loss.detach()]


def pair_speed(path: Path, strategy: str, *overrides: str) -> float:
    """Rounds a second of ``accelerate launch`` with one thread a process: two for a strategy, one for ``none``."""
    config = load_config(path, overrides)
    assert config.run.experiment is not None
    assert config.run.name is not None
    folder = config.run.output / config.run.experiment / config.run.name
    shutil.rmtree(folder, ignore_errors=True)
    file = {"none": "single", "ddp": "cpu_pair"}.get(strategy, strategy)
    start = ["launch", "--config_file", f"launch/{file}.yaml", "--num_processes", "1" if strategy == "none" else "2"]
    command = [str(Path(sys.executable).parent / "accelerate"), *start, "dctc/train.py", str(path), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    if done.returncode:
        raise SystemExit(f"{strategy} failed:\n{done.stdout}\n{done.stderr}")
    lines = [json.loads(line)["values"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [values["perf/rounds_per_s"] for values in lines if "perf/rounds_per_s" in values]
    return float(statistics.median(speeds[min(2, len(speeds) - 1) :]))


def resident(kind: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def main(kind: str, config: str, rounds: int) -> None:
    """Run a loop on held batches; print the memory after imports and at its peak, in MiB."""
    torch.set_num_threads(1)
    alone()
    start = resident("VmRSS")
    trainer = make_trainer(Path(config))
    batches = held_batches(trainer, 2)
    loop: TrainerLoop | PlainLoop = TrainerLoop(trainer)
    if kind == "plain":
        loop = PlainLoop(trainer, own=True)
        del trainer
    for step in range(rounds):
        loop(*batches[step % 2], step, step % LOG == LOG - 1 or step == rounds - 1)
    print(json.dumps([start, resident("VmHWM")]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
