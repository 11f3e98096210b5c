"""The parent run of a sweep, under which MLflow shows the sweep's runs."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dctc.tracking.delivery import PENDING
from dctc.tracking.remote import IDENTITY, Event, RemoteRun, RunSettings, shown
from dctc.tracking.start import send_late
from dctc.tracking.store import client_of

PARENT_TAG = "mlflow.parentRunId"


class ParentRun:
    """One MLflow run a sweep; the folder remembers which, so that a sweep that goes on has the same.

    ``run_id`` is None where no server answers: the sweep runs all the same, its runs without a parent.
    """

    def __init__(self, folder: Path, uri: str, names: tuple[str, str], params: Mapping[str, Any], file: Path) -> None:
        """Make or find it, with ``file`` as its artifact. ``names``: experiment and sweep."""
        settings = RunSettings(folder, *names, uri, {"sweep": names[1], "kind": "sweep"}, params, started=time.time())
        self.run_id: str | None = None
        self._uri = uri
        try:
            with _alone(folder):
                self._remote = RemoteRun(settings, reopen=True)
                self._remote.connect()
            self._remote.send(Event("artifact", time.time(), file=str(file.resolve())))
            self.run_id = self._remote.run_id
        except Exception as error:  # whatever MLflow or the network raises
            print(f"warning: MLflow at {shown(uri)} has no parent for the runs, which go on without ({_reason(error)})")

    def adopt(self, folder: Path) -> None:
        """Put a run that is finished under this one; what MLflow has not got of it is sent first.

        Runs that went on while the server was away, or under a parent that was deleted since, are found so.
        """
        if self.run_id is None:
            return
        if (folder / PENDING).exists():
            send_late(folder)
        if not (folder / IDENTITY).exists():
            return
        known = json.loads((folder / IDENTITY).read_text())
        if known["run_id"] is None or known["tracking_uri"] != self._uri:
            return
        try:
            client = client_of(self._uri)
            if client.get_run(known["run_id"]).data.tags.get(PARENT_TAG) != self.run_id:
                client.set_tag(known["run_id"], PARENT_TAG, self.run_id)
        except Exception as error:
            print(f"warning: MLflow does not put {folder} under its parent ({_reason(error)})")

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        if self.run_id is None:
            return
        try:
            self._remote.send(Event("status", time.time(), status=status))
        except Exception as error:
            print(f"warning: MLflow does not take the sweep's end ({_reason(error)})")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Jobs that run parts of one sweep begin together, and the first one's parent is to be everyone's."""
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(error: Exception) -> str:
    """One short line."""
    return shown(" ".join(f"{type(error).__name__}: {error}".split())[:200])
