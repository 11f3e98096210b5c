"""The loop: fetch, update, log, validate, save."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dctc.data.loaders import StreamBatch, TrainingStream
from dctc.engine.checkpoint import CheckpointError, Checkpoints, Progress
from dctc.engine.console import Console
from dctc.engine.meters import Compute, Meters
from dctc.engine.parallel import Parallel
from dctc.engine.precision import Precision
from dctc.engine.preempt import StopRequest
from dctc.engine.profile import Profile
from dctc.engine.schedule import Schedule
from dctc.engine.update import Losses, Updater
from dctc.engine.watch import Watch
from dctc.methods.base import Batch, Method, Survey, Total, Update


class Tracker(Protocol):
    """Where a run's numbers, pictures and files go (see ``dctc.tracking.run``)."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""

    def picture(self, file: Path, key: str, step: int) -> None:
        """A picture of one step."""

    def artifact(self, file: Path) -> None:
        """A file of the run."""

    def model(self, file: Path) -> None:
        """The run's model file."""

    def finish(self, status: str) -> None:
        """The end: FINISHED, FAILED or KILLED."""

    @property
    def run_id(self) -> str | None:
        """The id under which the run can be continued, once known."""

    def await_run_id(self) -> str | None:
        """The same after a bounded wait for a server that is slow; None when there is none to wait for."""


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


MOST_SKIPS = 100  # updates skipped in a row: nothing is learnt any more
COLLECT_EVERY = 100  # rounds


def _collect(done: int) -> None:
    if done % COLLECT_EVERY == 0:
        gc.collect(1)


@contextmanager
def collected_between_rounds() -> Iterator[Callable[[int], None]]:
    """No garbage collection in the middle of a round, where one rank's pause holds up all: every hundred rounds, on all
    ranks in the same one. Yields what to call after each round."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield _collect
    finally:
        gc.enable()
        gc.unfreeze()


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
    profile: Profile
    compute: Compute | None = None
    _skips: int = 0  # updates skipped in a row
    _begun: bool = False

    @property
    def tiles_per_round(self) -> int:
        """Tiles of the global batch of both streams."""
        return self.labelled.batch + (self.unlabelled.batch if self.unlabelled else 0)

    @property
    def streams(self) -> list[TrainingStream]:
        """The streams that the method reads."""
        return [stream for stream in (self.labelled, self.unlabelled) if stream is not None]

    def run(self) -> bool:
        """Train to the end; False when it was asked to stop and left a checkpoint to go on from."""
        total, progress = self.schedule.rounds, self.progress
        console = Console(total, progress.rounds, self.parallel.is_main)
        meters = Meters(self.parallel, self.tiles_per_round, self.compute)
        try:
            with self.parallel.own_errors(), collected_between_rounds() as collect:
                for batches, waited in self._batches(range(progress.rounds, total)):
                    self._round(batches, waited, meters, console)
                    collect(progress.rounds)
                    if self._save_when_due(meters, console):
                        return False
            return True
        except Exception:
            self.checkpoints.settle()
            raise
        finally:
            console.close()

    def _round(self, batches: list[list[Batch]], waited: float, meters: Meters, console: Console) -> None:
        """One round, with the log, the validation and the pictures that are due after it."""
        progress, total = self.progress, self.schedule.rounds
        started = time.perf_counter()
        rate = self.updater.set_rate(self.schedule.factor(progress.rounds))
        self.updater.measure = due(self.every.log, progress.rounds + 1, total)
        with self.profile.round(progress.rounds):
            losses = self.round(batches[0], batches[-1] if self.unlabelled else [], progress.rounds)
        self._count_skips(losses)
        meters.add(progress.rounds, losses, waited)
        progress.rounds += 1
        progress.seconds += waited + time.perf_counter() - started
        if not self._begun:
            self._begun = True
            self.parallel.started()
        console.round(progress.rounds)
        self._log(meters, rate, console)

    def _save_when_due(self, meters: Meters, console: Console) -> bool:
        """Write a checkpoint when it is time to; whether the run was asked to stop, and has its checkpoint."""
        progress, total = self.progress, self.schedule.rounds
        stopping = self.parallel.any(self.stop.received is not None) and progress.rounds < total
        last = stopping or progress.rounds == total
        if not last and not due(self.every.checkpoint, progress.rounds, total):
            return False
        self._check(meters, console)
        self._check_weights()  # what is not finite must not become the latest checkpoint
        progress.tracking_id = self.tracker.run_id
        progress.memory = self.method.memory
        scale = self.updater.precision.loss_scale
        progress.loss_scale = None if scale is None else [scale.value, scale.since]
        try:
            self.checkpoints.save(self.updater.parts, progress)
        except CheckpointError as error:  # of the one before: a full disk may have room again
            console.line(f"warning: {error}; training goes on")
            self.checkpoints.save(self.updater.parts, progress)
        if last:
            with meters.paused():
                self.checkpoints.wait()
        if stopping:
            console.line(f"stopped after round {progress.rounds}/{total}; run the same command again to go on")
        return stopping

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> list[Losses]:
        """All steps of one round. What a method does between two of them runs under autocast too."""
        steps = self.method.round(labelled, unlabelled, step)
        losses: list[Losses] = []
        answer: Tensor | None = None
        while True:
            try:
                with self.precision.autocast():
                    wanted = steps.send(answer)
            except StopIteration:
                return losses
            answer = None
            if isinstance(wanted, Update):
                losses.append(self.updater(wanted))
            elif isinstance(wanted, Survey):
                answer = self.watch.survey(wanted)
            elif isinstance(wanted, Total):
                answer = self.parallel.sum(wanted.own)
            else:
                self.updater.change(wanted)

    def _log(self, meters: Meters, rate: float, console: Console) -> None:
        done, total = self.progress.rounds, self.schedule.rounds
        if due(self.every.log, done, total):
            self._check(meters, console)
            meters.worked = self.updater.clock.read()
            metrics = meters.read(rate)
            self.tracker.metrics(metrics, done)
            console.metrics(done, metrics)
            if (slow := meters.straggler) is not None:
                console.line(
                    f"warning: rank {slow[0]} on {slow[1]} is slow: {slow[2]:.3f} s of its own work a round "
                    f"(data and forward pass), {slow[3]:.3f} s is the median; the others wait for it"
                )
        with meters.paused():
            self._look(console)

    def _count_skips(self, losses: Sequence[Losses]) -> None:
        for update in losses:
            self._skips = self._skips + 1 if update.skipped else 0
            self.progress.skipped += update.skipped
        if self._skips >= MOST_SKIPS:
            raise FloatingPointError(
                f"{self._skips} updates in a row were skipped because they were not finite, the last in round "
                f"{self.progress.rounds + 1}: lower optimizer.lr, or use precision.dtype=bf16 or fp32"
            )

    def _check(self, meters: Meters, console: Console) -> None:
        """Name round, losses and tiles where a loss is not finite; stop, unless such updates are skipped.

        Raises:
            FloatingPointError: on all ranks.
        """
        found = meters.nonfinite()
        if not self.parallel.any(found is not None):
            return
        reports: list[tuple[int, str]] = [r for r in self.parallel.gather(found and self._report(*found)) if r]
        first = min(step for step, _ in reports)
        told = "; ".join(text for step, text in reports if step == first)
        if self.updater.skips:
            console.line(f"warning: round {first + 1}: {told}; the update was skipped")
            return
        raise FloatingPointError(
            f"round {first + 1}: {told}. Look at these tiles; lower optimizer.lr, set optimizer.clip, use "
            "precision.dtype=fp32, or leave such updates out with optimizer.nonfinite=skip"
        )

    def _check_weights(self) -> None:
        """Raise :class:`FloatingPointError` on all ranks where the last steps ruined a part, whatever the losses."""
        bad = [name for name, part in self.updater.parts.items() if not part.is_finite()]
        if self.parallel.any(bool(bad)):
            names = sorted({name for names in self.parallel.gather(bad) for name in names})
            raise FloatingPointError(
                f"round {self.progress.rounds}: weights of {', '.join(names)} are not finite any more: lower "
                "optimizer.lr, set optimizer.clip, or leave such updates out with optimizer.nonfinite=skip; the same "
                "command goes on from the latest checkpoint, which is sound"
            )

    def _report(self, step: int, terms: Sequence[str]) -> tuple[int, str]:
        tiles = "; ".join(
            f"{kind} {', '.join(stream.keys(step))}"
            for kind, stream in zip(("labelled", "unlabelled"), self.streams, strict=False)
        )
        return step, f"loss {', '.join(terms)} is not finite on rank {self.parallel.rank} (its tiles: {tiles})"

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

    def _batches(self, rounds: range) -> Iterator[tuple[list[list[Batch]], float]]:
        """For each round the micro-batches of each stream, and the seconds spent waiting for them."""
        sources = [stream.batches(rounds, self.parallel.device) for stream in self.streams]
        for _ in rounds:
            started = time.perf_counter()
            batches = [[self._batch(tensors) for tensors in next(source)] for source in sources]
            yield batches, time.perf_counter() - started

    def _batch(self, tensors: StreamBatch) -> Batch:
        images, *views = (
            image.contiguous(memory_format=self.precision.memory_format) for image in (tensors.images, *tensors.views)
        )
        return Batch(**tensors._replace(images=images, views=tuple(views))._asdict())
