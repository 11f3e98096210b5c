"""The loop: fetch, update, log, validate, save."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dctc.data.loaders import DeviceBatch, TrainingStream
from dctc.engine.checkpoint import Checkpoints, Progress
from dctc.engine.console import Console
from dctc.engine.meters import Meters
from dctc.engine.parallel import Parallel
from dctc.engine.precision import Precision
from dctc.engine.preempt import StopRequest
from dctc.engine.schedule import Schedule
from dctc.engine.update import Losses, Updater
from dctc.engine.watch import Watch
from dctc.methods.base import Batch, Method


class Tracker(Protocol):
    """Where a run's numbers, pictures and files go (see ``dctc.tracking.run``)."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""

    def picture(self, file: Path, key: str, step: int) -> None:
        """A picture of one step."""

    def artifact(self, file: Path) -> None:
        """A file of the run."""

    def finish(self, status: str) -> None:
        """The end: FINISHED, FAILED or KILLED."""

    @property
    def run_id(self) -> str | None:
        """The id under which the run can be continued, once known."""


@dataclass(frozen=True)
class Every:
    """Intervals in rounds; 0 is never."""

    log: int
    validate: int
    picture: int
    checkpoint: int


def due(interval: int, done: int, total: int) -> bool:
    """Whether something that happens every ``interval`` rounds, and at the end, happens after round ``done``."""
    return interval > 0 and (done % interval == 0 or done == total)


@dataclass
class Trainer:
    """One run of a method. Build it with :func:`dctc.engine.build.prepare`."""

    tracker: Tracker
    method: Method
    updater: Updater
    precision: Precision
    parallel: Parallel
    labelled: TrainingStream
    unlabelled: TrainingStream | None
    schedule: Schedule
    every: Every
    checkpoints: Checkpoints
    progress: Progress
    stop: StopRequest
    watch: Watch

    @property
    def tiles_per_round(self) -> int:
        """Tiles of the global batch of both streams."""
        return self.labelled.batch + (self.unlabelled.batch if self.unlabelled else 0)

    def run(self) -> bool:
        """Train to the end; False when it was asked to stop and left a checkpoint to go on from."""
        total, progress = self.schedule.rounds, self.progress
        console = Console(total, progress.rounds, self.parallel.is_main)
        streams = [stream for stream in (self.labelled, self.unlabelled) if stream is not None]
        meters = Meters(self.parallel, self.tiles_per_round)
        try:
            for batches, waited in self._batches(streams, range(progress.rounds, total)):
                started = time.perf_counter()
                rate = self.updater.set_rate(self.schedule.factor(progress.rounds))
                meters.add(self.round(batches[0], batches[-1] if self.unlabelled else [], progress.rounds), waited)
                progress.rounds += 1
                progress.seconds += waited + time.perf_counter() - started
                console.round(progress.rounds)
                self._log(meters, rate, console)
                stopping = self.parallel.any(self.stop.received is not None)
                if stopping or progress.rounds == total or due(self.every.checkpoint, progress.rounds, total):
                    meters.check(progress.rounds)  # what is not finite must not become the latest checkpoint
                    progress.tracking_id = self.tracker.run_id
                    self.checkpoints.save(self.updater.parts, self.updater.optimizers, progress)
                if stopping and progress.rounds < total:
                    console.line(f"stopped after round {progress.rounds}/{total}; run the same command again to go on")
                    return False
            return True
        finally:
            console.close()

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> list[Losses]:
        """All updates of one round. What a method does between two updates runs under autocast too."""
        updates = self.method.round(labelled, unlabelled, step)
        losses: list[Losses] = []
        while True:
            with self.precision.autocast():
                update = next(updates, None)
            if update is None:
                return losses
            losses.append(self.updater(update))

    def _log(self, meters: Meters, rate: float, console: Console) -> None:
        done, total = self.progress.rounds, self.schedule.rounds
        if due(self.every.log, done, total):
            meters.check(done)
            metrics = meters.read(rate)
            self.tracker.metrics(metrics, done)
            console.metrics(done, metrics)
        with meters.paused():
            self._look(console)

    def _look(self, console: Console) -> None:
        """Validate and draw when it is time to."""
        done, total = self.progress.rounds, self.schedule.rounds
        if due(self.every.validate, done, total):
            values = self.watch.validate(self.progress)
            self.tracker.metrics(values, done)
            if (score := values.get(f"val/{self.method.headline}/miou")) is not None:
                console.line(f"round {done}/{total} | validation mIoU {score:.4f} | best {self.progress.best:.4f}")
        if due(self.every.picture, done, total):
            for key, file in self.watch.draw(done).items():
                self.tracker.picture(file, key, done)

    def _batches(self, streams: Sequence[TrainingStream], rounds: range) -> Iterator[tuple[list[list[Batch]], float]]:
        """For each round the micro-batches of each stream, and the seconds spent waiting for them."""
        sources = [stream.batches(rounds, self.parallel.device) for stream in streams]
        for _ in rounds:
            started = time.perf_counter()
            batches = [[self._batch(tensors) for tensors in next(source)] for source in sources]
            yield batches, time.perf_counter() - started

    def _batch(self, tensors: DeviceBatch) -> Batch:
        images, valid, labels = tensors
        return Batch(images.contiguous(memory_format=self.precision.memory_format), valid, labels)
