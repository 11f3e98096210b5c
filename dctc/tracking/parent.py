"""The parent run of a sweep, under which MLflow shows the sweep's runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dctc.tracking.remote import Event, RemoteRun, RunSettings, shown

PARENT_TAG = "mlflow.parentRunId"


class ParentRun:
    """One MLflow run a sweep; the folder remembers which, so that a sweep that goes on has the same.

    ``run_id`` is None where no server answers: the sweep runs all the same, its runs without a parent.
    """

    def __init__(self, folder: Path, uri: str, names: tuple[str, str], params: Mapping[str, Any], file: Path) -> None:
        """Make or find it, with ``file`` as its artifact. ``names``: experiment and sweep."""
        settings = RunSettings(folder, *names, uri, {"sweep": names[1], "kind": "sweep"}, params, started=time.time())
        self.run_id: str | None = None
        self._remote = RemoteRun(settings, reopen=True)
        try:
            self._remote.connect()
            self._remote.send(Event("artifact", time.time(), file=str(file.resolve())))
            self.run_id = self._remote.run_id
        except Exception as error:  # whatever MLflow or the network raises
            print(f"warning: MLflow at {shown(uri)} does not answer ({type(error).__name__}): the runs have no parent")

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        if self.run_id is None:
            return
        try:
            self._remote.send(Event("status", time.time(), status=status))
        except Exception as error:
            print(f"warning: MLflow does not take the sweep's end ({type(error).__name__})")
