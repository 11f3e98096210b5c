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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from dctc.engine.parallel import Parallel
from shards.errors import InputError

PROGRESS = "progress.json"
LATEST = "latest"
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
    """

    rounds: int = 0
    best: float | None = None
    tracking_id: str | None = None
    dataset: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

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


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``RUN/checkpoints``.
        keep: how many complete ones stay.
    """

    def __init__(self, folder: Path, keep: int, parallel: Parallel) -> None:
        self.folder = folder
        self.keep = keep
        self.parallel = parallel

    def save(self, parts: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], progress: Progress) -> Path:
        """Write one checkpoint; all ranks call it. Returns its folder."""
        final = self.folder / f"step-{progress.rounds:08d}"
        if final.exists():  # the same run, the same round: the same state
            self._publish(final)
            return final
        draft = final.with_suffix(".tmp")
        if self.parallel.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.parallel.wait()
        stepped = [name for name in parts if optimizers[name].state]
        state = {**_tensors(parts, optimizers, stepped), "rng": _random_state()}
        save(state, checkpoint_id=draft, no_dist=self.parallel.world == 1)
        if self.parallel.is_main:
            _write_synced(draft / PROGRESS, json.dumps(asdict(progress), indent=1))
            _sync_folder(draft)
            draft.rename(final)
            _sync_folder(self.folder)
        self._publish(final)
        return final

    def _publish(self, final: Path) -> None:
        """Name the checkpoint in ``latest`` and let the oldest go, by the time of writing and never this one."""
        if self.parallel.is_main:
            _write_synced(self.folder / f".{LATEST}", final.name)
            (self.folder / f".{LATEST}").replace(self.folder / LATEST)
            others = sorted(set(complete(self.folder)) - {final}, key=lambda path: path.stat().st_mtime_ns)
            for old in others[: max(0, len(others) - self.keep + 1)]:
                shutil.rmtree(old)
        self.parallel.wait()

    def load(self, source: Path, parts: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
        """Put the tensors of ``source`` into the parts and optimizers, and the generators' states back."""
        try:
            keys = FileSystemReader(source).read_metadata().state_dict_metadata
            stepped = [name for name in parts if any(key.startswith(f"{name}.optimizer.") for key in keys)]
            state = {**_tensors(parts, optimizers, stepped), "rng": _random_state()}
            load(state, checkpoint_id=source, no_dist=self.parallel.world == 1)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise InputError(
                f"{source}: this checkpoint cannot be read ({_reason(error)}); remove it to use an older one"
            ) from error
        for name, module in parts.items():
            set_model_state_dict(module, state[name]["model"])
            if name in stepped:
                set_optimizer_state_dict(module, optimizers[name], state[name]["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


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


def _tensors(
    parts: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], stepped: Sequence[str]
) -> dict[str, Any]:
    """Weights of all parts, moments of those that have stepped: asking torch for the others' would step them."""
    state: dict[str, Any] = {name: {"model": get_model_state_dict(module)} for name, module in parts.items()}
    for name in stepped:
        state[name]["optimizer"] = get_optimizer_state_dict(parts[name], optimizers[name])
    return state


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
