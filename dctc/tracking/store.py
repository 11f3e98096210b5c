"""MLflow's client of a server, or of a database in a file, which is made here when there is none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger("dctc.tracking")

# Set only where the user has not. Short, because undelivered events are kept and sent again anyway; quiet, because
# a progress bar shares the terminal; no telemetry, because a training job does not call home unasked.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def load_mlflow() -> type[MlflowClient]:
    """Import MLflow, quiet and with short time limits unless the user's environment says otherwise."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    alembic = logging.getLogger("alembic")
    if alembic.level == logging.NOTSET:
        alembic.setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient


def client_of(uri: str) -> MlflowClient:
    """A client of the server or database at ``uri``; one of a SQLite file is made by one process at a time.

    MLflow makes the tables of a new file, and renews an older version's, step by step and without a lock: two runs that
    start together, or one that is killed then, leave a file of half the tables, which no later run can use. So a new
    file gets its name when it is whole.
    """
    make = load_mlflow()
    database = database_of(uri)
    if database is None:
        return make(tracking_uri=uri)
    lock_file = database.with_name(f"{database.name}.lock")
    if database.exists() and not os.access(lock_file if lock_file.exists() else database.parent, os.W_OK):
        return make(tracking_uri=uri)  # another user's, to be read
    database.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning("%s: this file system has no locks: start the first run alone", database.parent)
        if not database.exists():
            draft = database.with_name(f".{database.name}.new")
            draft.unlink(missing_ok=True)  # of a process that was killed
            make(tracking_uri=f"sqlite:///{quoted(draft)}")
            draft.replace(database)
        return make(tracking_uri=uri)


def database_of(uri: str) -> Path | None:
    """The file of a ``sqlite:`` address, without its options; None for a server, or a database in memory."""
    path = unquote(uri.removeprefix("sqlite:///").partition("?")[0])
    return Path(path) if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def quoted(path: Path) -> str:
    """A file's path in an address; what needs no quotes stays as it is, so that runs know their store again."""
    text = str(path).replace("?", "%3F")
    return text if unquote(text) == str(path) else str(path).replace("%", "%25").replace("?", "%3F")
