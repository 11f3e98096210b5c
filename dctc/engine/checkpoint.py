"""Checkpoints that are complete or absent: written beside, synced, renamed.

``checkpoints/step-00000120/`` holds the tensors (torch.distributed.checkpoint, readable by any number of ranks) and
``progress.json``; ``latest`` names the one to go on from. A folder of that name without ``.tmp`` is complete, because
it got the name after everything in it reached the disk; the one before goes only then.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from dctc.engine.parallel import Parallel
from dctc.engine.parts import Part
from shards.errors import InputError

PROGRESS = "progress.json"
LATEST = "latest"
REMOVED = ".removed"  # ends the name of what is being removed
_NAME = re.compile(r"step-\d{8}")


@dataclass
class Progress:
    """All that a run needs to go on, besides its tensors.

    Attributes:
        rounds: rounds done; the streams' positions follow from it alone.
        best: best headline validation mIoU so far, None before the first validation.
        tracking_id: the MLflow run, None while it is not known.
        dataset: digest of the dataset's manifest.
        settings: the settings that decide the result.
        seconds: training time so far.
        loss_scale: value and age of fp16's loss scale, None in other precisions.
        skipped: updates left out because something was not finite.
        memory: what the method remembers beside its parts (:class:`dctc.methods.base.Method`).
        weights: SHA-256 of the file of ``network.weights`` that the run began with, None when it began without one.
    """

    rounds: int = 0
    best: float | None = None
    tracking_id: str | None = None
    dataset: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    loss_scale: list[float] | None = None
    skipped: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def must_match(self, dataset: str, settings: Mapping[str, Any], source: Path) -> None:
        """Refuse to go on with other data or settings; raises :class:`InputError` naming the keys."""
        if self.dataset != dataset:
            raise InputError(
                f"{source}: was made with another dataset (manifest {self.dataset[:12]}, now {dataset[:12]}); "
                "choose another run.name"
            )
        keys = sorted(k for k in {*self.settings, *settings} if self.settings.get(k) != settings.get(k))
        if keys:
            changes = ", ".join(f"{k} (was {self.settings.get(k)!r}, now {settings.get(k)!r})" for k in keys)
            raise InputError(
                f"{source}: was made with other settings: {changes}; undo the change or choose another run.name"
            )


class CheckpointError(Exception):
    """A checkpoint could not be written; the message says why, and which one is the last good one."""


class Checkpoints:
    """The checkpoints of one run. All ranks call every method.

    A checkpoint is copied to the host's memory at once and written by a thread while training goes on; the next one
    waits for it, so at most one is under way.

    Args:
        folder: ``RUN/checkpoints``.
        keep: how many complete ones stay.
    """

    def __init__(self, folder: Path, keep: int, parallel: Parallel) -> None:
        self.folder = folder
        self.keep = keep
        self.parallel = parallel
        self._under_way: tuple[Path, Future[None]] | None = None
        self._own: set[Path] = set()  # what this process wrote or goes on from

    def save(self, parts: Mapping[str, Part], progress: Progress) -> Path:
        """Begin to write a checkpoint; returns the folder that it will have. :meth:`wait` says whether it got it.

        Raises:
            CheckpointError: the one before could not be written. This one was not begun.
        """
        self.wait()
        final = self.folder / f"step-{progress.rounds:08d}"
        if final in self._own and self.parallel.from_main(final.exists()):  # this very state
            if self.parallel.is_main:
                self._publish(final)
            self.parallel.wait()
            return final
        self._own.add(final)
        self._under_way = final, self._start(final, parts, progress)
        return final

    def wait(self) -> None:
        """Wait until what is under way is written.

        Raises:
            CheckpointError: it could not be, on any rank. Nothing of it is left.
        """
        if self._under_way is None:
            return
        (final, writing), self._under_way = self._under_way, None
        error = writing.exception()
        reasons = [reason for reason in self.parallel.gather(None if error is None else _reason(error)) if reason]
        if not reasons:
            return
        self._own.discard(final)
        if self.parallel.is_main:
            shutil.rmtree(_draft(final), ignore_errors=True)
        last = self.parallel.from_main(latest(self.folder))
        raise CheckpointError(
            f"{final}: this checkpoint could not be written ({reasons[0]}); the last good one is {last}"
        )

    def settle(self, seconds: float = 20.0) -> None:
        """Give what is under way some time to be written, before this process ends by an error of its own.

        No rank waits for another one here: each has a writing thread, and these meet without the main threads.
        """
        if self._under_way is not None:
            futures.wait([self._under_way[1]], timeout=seconds)

    def _start(self, final: Path, parts: Mapping[str, Part], progress: Progress) -> Future[None]:
        draft = _draft(final)
        problem = None
        if self.parallel.is_main:
            try:
                for stale in self.folder.glob("step-*.tmp"):
                    shutil.rmtree(stale)
                draft.mkdir(parents=True)
            except OSError as error:
                problem = error
        if problem := self.parallel.from_main(problem):
            return _failed(problem)
        state = {**{name: part.state() for name, part in parts.items()}, "rng": _random_state()}
        record = json.dumps(asdict(progress), indent=1)
        outcome: Future[None] = Future()

        def complete_it(written: Future[Any]) -> None:
            try:
                written.result()
                if self.parallel.is_main:
                    self._complete(draft, final, record)
                outcome.set_result(None)
            except BaseException as error:  # torch's own exception for checkpoints is no Exception
                outcome.set_exception(error)

        alone = self.parallel.world == 1
        writing = async_save(state, checkpoint_id=draft, process_group=self.parallel.storage, no_dist=alone)
        assert isinstance(writing, Future)
        writing.add_done_callback(complete_it)
        return outcome

    def _complete(self, draft: Path, final: Path, record: str) -> None:
        """All ranks have written their files: give the checkpoint its record and its name (main rank)."""
        _write_synced(draft / PROGRESS, record)
        _sync_folder(draft)
        if final.exists():  # of a training that went another way from an older checkpoint
            final.rename(_aside(final))
        draft.rename(final)
        _sync_folder(self.folder)
        self._publish(final)

    def _publish(self, final: Path) -> None:
        """Name the checkpoint in ``latest`` and let the oldest go, by the time of writing and never this one."""
        _write_synced(self.folder / f".{LATEST}", final.name)
        (self.folder / f".{LATEST}").replace(self.folder / LATEST)
        others = sorted(set(complete(self.folder)) - {final}, key=lambda path: path.stat().st_mtime_ns)
        for old in others[: max(0, len(others) - self.keep + 1)]:
            old.rename(_aside(old))  # a folder of that name is complete until the end, also where removing it fails
        for old in self.folder.glob(f"*{REMOVED}"):
            shutil.rmtree(old, ignore_errors=True)

    def load_weights(self, source: Path, modules: Mapping[str, nn.Module]) -> None:
        """Put the weights and buffers of ``source`` into modules that are not wrapped yet.

        Raises:
            InputError: the checkpoint cannot be read, or is one of another network.
        """
        state: dict[str, Any] = {name: {"model": module.state_dict()} for name, module in modules.items()}
        self._read(source, lambda _: state)
        for name, module in modules.items():
            module.load_state_dict(state[name]["model"])

    def load_optimizers(self, source: Path, parts: Mapping[str, Part]) -> None:
        """Put the optimizer states of ``source`` into the parts, and the random generators' states back.

        Raises:
            InputError: the checkpoint cannot be read.
        """
        self._own.add(self.folder / source.name if source.parent.resolve() == self.folder.resolve() else source)
        stepped: dict[str, Part] = {}

        def template(sizes: dict[str, torch.Size]) -> dict[str, Any]:
            stepped.update(
                {n: part for n, part in parts.items() if any(path.startswith(f"{n}.optimizer.") for path in sizes)}
            )
            random = {key: value for key, value in _random_state().items() if f"rng.{key}" in sizes}
            return {
                "rng": random,  # a checkpoint of a CPU has no GPU's
                **{n: {"optimizer": p.optimizer_state(_below(f"{n}.optimizer.", sizes))} for n, p in stepped.items()},
            }

        state = self._read(source, template)
        for name, part in stepped.items():
            part.load_optimizer(state[name]["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])

    def _read(self, source: Path, template: Callable[[dict[str, torch.Size]], dict[str, Any]]) -> dict[str, Any]:
        try:
            found = FileSystemReader(source).read_metadata().state_dict_metadata
            state = template({path: getattr(entry, "size", torch.Size()) for path, entry in found.items()})
            alone = self.parallel.world == 1
            load(state, checkpoint_id=source, process_group=self.parallel.storage, no_dist=alone)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise InputError(
                f"{source}: this checkpoint cannot be read ({_reason(error)}); remove it to use an older one"
            ) from error
        return state


def latest(folder: Path) -> Path | None:
    """The checkpoint to go on from: the one that ``latest`` names, else the one of most rounds, else None."""
    found = complete(folder)
    try:
        named = folder / (folder / LATEST).read_text().strip()
    except OSError:
        named = folder
    return named if named in found else found[-1] if found else None


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, in the order of their rounds."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def read_progress(source: Path) -> Progress:
    """The progress of a checkpoint folder; raises :class:`InputError` when it is none."""
    try:
        return Progress(**json.loads((source / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{source}: not a complete checkpoint of this version ({error})") from None


def _draft(final: Path) -> Path:
    return final.with_suffix(".tmp")


def _aside(final: Path) -> Path:
    return final.with_suffix(f".{time.time_ns()}{REMOVED}")


def _failed(error: BaseException) -> Future[None]:
    outcome: Future[None] = Future()
    outcome.set_exception(error)
    return outcome


def _below(prefix: str, sizes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    return {path.removeprefix(prefix): size for path, size in sizes.items() if path.startswith(prefix)}


def _reason(error: BaseException) -> str:
    """One line; a failure of several ranks is told by the first one's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
