"""A real Dask cluster: a scheduler and worker processes that talk over TCP on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@dataclass
class DaskCluster:
    """Processes and the scheduler's address; ``workers`` in the order in which they were started."""

    folder: Path
    address: str = ""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def scheduler_file(self) -> Path:
        """Where the scheduler says its address."""
        return self.folder / "scheduler.json"

    def start(
        self, arguments: Sequence[str], code: Path = REPOSITORY, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """A `dask` process in a folder of its own that imports dctc from ``code``."""
        environment = os.environ | {"PYTHONPATH": str(code)}
        command = [*prefix, sys.executable, "-W", "ignore", "-m", "dask", *arguments, "--no-dashboard"]
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=self.folder)

    def add_worker(self, code: Path = REPOSITORY, prefix: Sequence[str] = ()) -> None:
        """A worker of one thread; without a nanny, which would start another when it is killed."""
        arguments = ["worker", self.address, "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1"]
        self.workers.append(self.start(arguments, code, prefix))

    def kill_worker(self) -> None:
        """kill -9 for the first worker."""
        self.workers[0].send_signal(signal.SIGKILL)
        self.workers[0].wait()


@contextmanager
def running_cluster(folder: Path) -> Iterator[DaskCluster]:
    """A scheduler without workers."""
    cluster = DaskCluster(folder)
    arguments = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(cluster.scheduler_file)]
    scheduler = cluster.start(arguments)
    try:
        wait_until(cluster.scheduler_file.is_file, "the scheduler's file")
        cluster.address = json.loads(cluster.scheduler_file.read_text())["address"]
        yield cluster
    finally:
        for process in [*cluster.workers, scheduler]:
            process.kill()
            process.wait()


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait for a condition; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
