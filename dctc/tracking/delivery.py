"""A background thread that sends a run folder's metrics, pictures and files to MLflow whenever the server answers.

``metrics.jsonl`` is the queue of metrics: the thread reads on where the last accepted line ended, so nothing piles up
in memory however long a server is away. Pictures, files and the final status wait in a short list, which is kept in
``mlflow_pending.jsonl`` as soon as a delivery fails and until everything has arrived.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from dctc.tracking.journal import METRICS, Entry, read_entries, write_atomically
from dctc.tracking.remote import METRICS_PER_BATCH, Event, Refused, RemoteRun, RunSettings, shown
from dctc.tracking.store import load_mlflow

logger = logging.getLogger("dctc.tracking")

T = TypeVar("T")

PENDING = "mlflow_pending.jsonl"
INTERVAL, LONGEST_INTERVAL = 1.0, 30.0  # seconds between deliveries; the longer while the server is away
AWAY_PATIENCE = 10.0  # seconds that the end of a run waits for a server that did not answer last time
# ... and for one that did: a finished run has its model to upload, a preempted one must leave within its grace time.
PATIENCE = {"FINISHED": 120.0, "FAILED": 15.0, "KILLED": 15.0}


class Delivery:
    """Owns the thread. :meth:`put` and :meth:`finish` are for the training thread and never raise."""

    def __init__(self, settings: RunSettings, waiting: Sequence[Event] = (), reopen: bool = False) -> None:
        self._settings = settings
        self._remote = RemoteRun(settings, reopen)
        self._metrics = settings.folder / METRICS
        self._pending = settings.folder / PENDING
        self._queue = deque(waiting)
        self._offset = 0
        self._failures = 0
        self._refusals: set[str] = set()
        self._closing = self._abandoned = False
        self._hurry, self._tried = threading.Event(), threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="mlflow-delivery", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None while no server has given one."""
        return self._remote.run_id

    def start(self, seconds: float) -> None:
        """Start delivering; returns after the first contact, or without it after ``seconds``."""
        # Imported here and not by the thread: a loader process forked during another thread's import would inherit
        # that module's lock, held for ever.
        load_mlflow()
        self._hurry.set()
        self._thread.start()
        self._tried.wait(seconds)

    def put(self, event: Event) -> None:
        """Have ``event`` sent after those before it."""
        self._queue.append(event)

    def flush(self, seconds: float) -> bool:
        """Wait until everything has arrived or the server is found away, at most ``seconds``; say which."""
        end = time.monotonic() + seconds
        self._tried.clear()
        self._hurry.set()
        while not self._drained() and time.monotonic() < end:
            if self._tried.wait(0.02) and self._failures:
                break
        return self._drained()

    def finish(self, status: str) -> None:
        """Send the rest and the final status within a bounded time; what could not be sent is kept in the folder."""
        if self._closing:
            return
        self.put(Event("status", time.time(), status=status))
        self._closing = True
        self._hurry.set()
        away = self._failures > 0 or not self._remote.connected
        self._thread.join(AWAY_PATIENCE if away else PATIENCE.get(status, AWAY_PATIENCE))
        if self._thread.is_alive():
            self._abandoned = True
            self.save_pending()
        if self._pending.exists():
            logger.warning(
                "MLflow at %s has not got everything: the rest is kept in %s and is sent when this run is opened again",
                shown(self._settings.uri),
                self._pending,
            )

    def attempt(self) -> None:
        """Send all there is; raises whatever MLflow raises when the server does not take it."""
        if not self._remote.connected:
            self._remote.connect()
        while entries := self._next_entries():
            self._unless_refused(self._remote.send_metrics, entries)
            self._offset = entries[-1].end
        while self._queue and not self._abandoned:
            event = self._queue[0]
            self._unless_refused(self._remote.send, event)
            self._queue.popleft()

    def save_pending(self) -> None:
        """Keep in the folder what has not arrived: the run's settings, then one event a line."""
        header = {"run": self._settings.as_json() | {"run_id": self.run_id}, "metrics": METRICS}
        folder = self._settings.folder.resolve()
        events = [asdict(event) | {"file": _below(folder, event.file)} for event in list(self._queue)]
        lines = [json.dumps(header), *map(json.dumps, events)]
        with self._writing:
            write_atomically(self._pending, ("\n".join(lines) + "\n").encode())

    def _loop(self) -> None:
        while True:
            self._hurry.wait(min(INTERVAL * 2**self._failures, LONGEST_INTERVAL))
            self._hurry.clear()
            closing = self._closing  # read first: what comes before closing is then part of this attempt
            try:
                self.attempt()
                self._arrived()
            except Exception as error:  # whatever MLflow or the network raises, training goes on
                self._failed(error)
            self._tried.set()
            if self._abandoned or (closing and (self._failures or self._drained())):
                return

    def _arrived(self) -> None:
        if self._failures:
            logger.warning("MLflow at %s answers again: everything kept has been sent", shown(self._settings.uri))
        self._failures = 0
        with self._writing:
            if self._drained() and not self._abandoned:
                self._pending.unlink(missing_ok=True)

    def _failed(self, error: Exception) -> None:
        if self._abandoned:
            return
        if not self._failures:
            logger.warning(
                "MLflow at %s takes nothing now (%s): the run goes on, what it logs is kept and sent later",
                shown(self._settings.uri),
                shown(_reason(error)),
            )
        self._failures = min(self._failures + 1, 10)
        self.save_pending()

    def _next_entries(self) -> list[Entry]:
        """The next lines of metrics, as many as fit one request."""
        entries: list[Entry] = []
        count = 0
        if self._abandoned:
            return entries
        for entry in read_entries(self._metrics, self._offset):
            count += len(entry.values)
            if entries and count > METRICS_PER_BATCH:
                break
            entries.append(entry)
        return entries

    def _unless_refused(self, call: Callable[[T], None], content: T) -> None:
        """A request that the server refuses for good is dropped with a warning, or it would hold up all after it."""
        try:
            call(content)
        except Refused as error:
            if str(error) not in self._refusals:
                logger.warning("MLflow does not take this, so it is only in %s: %s", self._settings.folder, error)
            self._refusals.add(str(error))

    def _drained(self) -> bool:
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        return self._remote.connected and not self._queue and self._offset >= size


def _reason(error: BaseException) -> str:
    """One short line: the innermost system error ("Connection refused") when there is one, else the error itself."""
    reason, inner = error, error.__context__
    while inner is not None:
        reason, inner = (inner if isinstance(inner, OSError) else reason), inner.__context__
    return " ".join(str(reason).split())[:200] or type(reason).__name__


def _below(folder: Path, file: str) -> str:
    """``file`` as seen from the run's folder, which may be moved before it is sent; others as they are."""
    path = Path(file)
    return str(path.relative_to(folder)) if file and path.is_relative_to(folder) else file


def load_pending(folder: Path) -> tuple[RunSettings, list[Event]] | None:
    """What ``mlflow_pending.jsonl`` in ``folder`` says has not been sent; None when there is no such file."""
    path = folder / PENDING
    if not path.exists():
        return None
    header, *events = (json.loads(line) for line in path.read_text().splitlines())
    return RunSettings.from_json(folder, header["run"]), [
        Event(**{**event, "file": event["file"] and str(folder.resolve() / event["file"])}) for event in events
    ]
