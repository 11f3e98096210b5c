"""The tracker of a run: ``metrics.jsonl`` always, MLflow when it is enabled, nothing on any rank but the first.

All three trackers have the same methods, those that the trainer asks for: ``metrics``, ``picture``, ``artifact``,
``model``, ``finish``, ``run_id``. None of them raises because a tracking server is away, and none waits for one while
training.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from dctc.tracking.delivery import PENDING, Delivery, load_pending
from dctc.tracking.journal import Journal
from dctc.tracking.remote import DatasetRecord, Event, RunSettings
from dctc.tracking.store import database_of, quoted
from shards.errors import InputError
from shards.manifest import Dataset

__all__ = [
    "DatasetRecord",
    "JsonTracker",
    "MlflowTracker",
    "RunSettings",
    "SilentTracker",
    "Tracker",
    "describe_dataset",
    "git_commit",
    "open_tracker",
    "resolve_uri",
    "send_pending",
]

logger = logging.getLogger("dctc.tracking")

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
FIRST_CONTACT = 5.0  # seconds that the start of a run waits to learn its MLflow run id
LAST_CONTACT = 15.0  # the same at its end: a run of seconds may be over before a new database is made


class SilentTracker:
    """Does nothing: for every rank but the first."""

    run_id: str | None = None

    def await_run_id(self) -> None:
        """There is none."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def picture(self, file: Path, key: str, step: int) -> None:
        """Nothing."""

    def artifact(self, file: Path) -> None:
        """Nothing."""

    def model(self, file: Path) -> None:
        """Nothing."""

    def finish(self, status: str) -> None:
        """Nothing."""


class JsonTracker:
    """Writes ``metrics.jsonl`` alone; pictures and files are in the run's folder already."""

    run_id: str | None = None

    def await_run_id(self) -> None:
        """There is none."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        self._journal = Journal(folder, resumed_step)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step; values that are not finite are kept as such (see :mod:`dctc.tracking.journal`)."""
        self._journal.append(values, step)

    def picture(self, file: Path, key: str, step: int) -> None:
        """Nothing: ``file`` stays where it is."""

    def artifact(self, file: Path) -> None:
        """Nothing: ``file`` stays where it is."""

    def model(self, file: Path) -> None:
        """Nothing: ``file`` stays where it is."""

    def finish(self, status: str) -> None:
        """Close the file."""
        self._journal.close()


class MlflowTracker:
    """Writes ``metrics.jsonl`` and has everything sent to MLflow by a background thread."""

    def __init__(self, settings: RunSettings, waiting: list[Event]) -> None:
        self._journal = JsonTracker(settings.folder, settings.resumed_step)
        self._delivery = Delivery(settings, waiting, reopen=settings.resumed_step is not None)
        self._delivery.start(FIRST_CONTACT)

    @classmethod
    def start(cls, settings: RunSettings) -> MlflowTracker:
        """Open the run; it exists on the server now, or as soon as the server answers.

        A run that resumes takes up what an earlier process could not send; a fresh one discards it, saying so.
        """
        if not settings.started:
            settings = dataclasses.replace(settings, started=time.time())
        pending = load_pending(settings.folder)
        waiting: list[Event] = []
        if pending is not None and settings.resumed_step is not None:
            waiting = [event for event in pending[1] if event.kind != "status"]
        elif pending is not None:
            logger.warning("%s of an earlier run is discarded: this run starts afresh", settings.folder / PENDING)
            (settings.folder / PENDING).unlink()
        return cls(settings, waiting)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while no server has given one."""
        return self._delivery.run_id

    def await_run_id(self) -> str | None:
        """The same, after waiting up to :data:`LAST_CONTACT` for a server that has not been found away."""
        if self.run_id is None:
            self._delivery.flush(LAST_CONTACT)
        return self.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step: to ``metrics.jsonl`` now, to MLflow within about a second."""
        self._journal.metrics(values, step)

    def picture(self, file: Path, key: str, step: int) -> None:
        """A picture file under ``key`` (shown with a slider over the steps); the file must stay until it is sent."""
        self._delivery.put(Event("picture", time.time(), file=str(file.resolve()), key=key, step=step))

    def artifact(self, file: Path) -> None:
        """A file of the run; it must stay until it is sent."""
        self._delivery.put(Event("artifact", time.time(), file=str(file.resolve())))

    def model(self, file: Path) -> None:
        """The run's model file, sent as the MLflow model ``runs:/ID/model`` and registered when the settings say so."""
        self._delivery.put(Event("model", time.time(), file=str(file.resolve())))

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait, at most ``seconds``, until all has arrived at the server; whether it has."""
        return self._delivery.flush(seconds)

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; what cannot be sent in bounded time is kept for later."""
        self._journal.finish(status)
        self._delivery.finish(status)


Tracker = MlflowTracker | JsonTracker | SilentTracker


def open_tracker(settings: RunSettings, *, main_process: bool, enabled: bool = True) -> Tracker:
    """The tracker of this process: silent unless it is the main one, without MLflow unless ``enabled``."""
    if not main_process:
        return SilentTracker()
    if not enabled:
        return JsonTracker(settings.folder, settings.resumed_step)
    return MlflowTracker.start(settings)


def send_pending(folder: Path) -> str | None:
    """Send what an ended run in ``folder`` could not: its run's id, or None when nothing was waiting.

    Raises:
        Exception: whatever MLflow raises while its server is still away; everything is then still kept.
    """
    pending = load_pending(folder)
    if pending is None:
        return None
    settings, waiting = pending
    delivery = Delivery(settings, waiting, reopen=True)
    try:
        delivery.attempt()
    except Exception:
        delivery.save_pending()
        raise
    (folder / PENDING).unlink()
    return delivery.run_id


def resolve_uri(configured: str | None, runs: Path) -> str:
    """The tracking server: ``tracking.uri``, else MLFLOW_TRACKING_URI, else ``mlflow.db`` beside the folder ``runs``.

    Raises:
        InputError: when it names no server or database that MLflow can use.
    """
    uri = (
        configured
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{quoted(runs.resolve().parent / 'mlflow.db')}"
    )
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else uri
    if scheme not in SCHEMES:
        source = "tracking.uri" if configured else "MLFLOW_TRACKING_URI"
        raise InputError(
            f"{source}: {uri!r} is no MLflow server or database (MLflow 3 has no folders of files any more): "
            "write http://HOST:PORT or sqlite:///PATH/mlflow.db"
        )
    database = database_of(uri)
    if database is None:
        return uri
    options = uri.partition("?")[1] + uri.partition("?")[2]
    return f"sqlite:///{quoted(database.resolve())}{options}"


def describe_dataset(dataset: Dataset) -> DatasetRecord:
    """A packed dataset as an MLflow input: name, digest, folder, and the counts that tell its size."""
    manifest = dataset.manifest
    profile = {
        "protocol": manifest.protocol,
        "tile_size": manifest.tile_size,
        "bands": [band.name for band in manifest.bands],
        "classes": manifest.class_names,
        "tiles": {split: info.tiles for split, info in manifest.splits.items()},
        "labelled": {split: info.labelled for split, info in manifest.splits.items()},
    }
    location = str(dataset.root.resolve()) if dataset.store is None else dataset.location
    return DatasetRecord(manifest.name, dataset.digest, location, profile)


def git_commit(folder: Path = Path(__file__).parent) -> str:
    """The commit of ``folder``, with ``-dirty`` when tracked files differ from it; ``unknown`` outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # fails for a copy installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
