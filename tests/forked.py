"""Commands in processes that begin where the imports end.

Importing torch, accelerate and MLflow takes seconds of processor time, and the suite runs hundreds of commands. A
server imports them once and forks a process for each command, which then runs the command's own entry point with its
own arguments, environment, working folder and streams, and ends as any Python process does. Tests of signals, of
imports and of the README start commands as users do.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

ENTRIES = {"dctc": "dctc.cli", "accelerate": "accelerate.commands.accelerate_cli"}  # modules with a `main`
PRELOADED = (
    "torch.distributed.checkpoint", "accelerate", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store",
    "rasterio", "dctc.engine.build", "shards.pack", *ENTRIES.values(),
)  # fmt: skip
AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "LD_")  # variables that come too late for a forked process
MESSAGE = 1 << 20  # bytes


def suits(command: str, environment: Mapping[str, str]) -> bool:
    """Whether a forked process is as good as a new one."""
    late = {name for name in {*environment, *os.environ} if name.startswith(AT_IMPORT)}
    return command in ENTRIES and all(environment.get(name) == server().environment.get(name) for name in late)


def run(
    command: str, words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As :func:`subprocess.run` with captured text.

    Raises:
        subprocess.TimeoutExpired: the command was killed.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(server().address)
            message = json.dumps([command, list(words), str(folder), dict(environment)]).encode()
            socket.send_fds(connection, [message], [output.fileno(), errors.fileno()])
            number = int(connection.recv(64))
            connection.settimeout(timeout)
            try:
                status = int(connection.recv(64))
            except TimeoutError:
                os.kill(number, signal.SIGKILL)
                raise subprocess.TimeoutExpired([command, *words], timeout) from None
        return subprocess.CompletedProcess([command, *words], status, _text(output), _text(errors))


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")


class Server:
    """The process that forks; it ends with the one that made it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self.address = f"{self._folder.name}/socket"
        # pyarrow's allocator would have a thread, which a fork loses.
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the server of forked commands did not come up"
        atexit.register(self._process.communicate)  # the end of its standard input


@cache
def server() -> Server:
    """This process's own."""
    return Server()


def serve(address: str) -> None:
    """Fork for each connection; returns in a process that has become a command, or when standard input ends."""
    before = dict(os.environ)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        for module in PRELOADED:
            importlib.import_module(module)
        threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        if len(threads) > 1:
            raise SystemExit(f"a fork would lose threads: {', '.join(threads)}")
        made = {name: value for name, value in os.environ.items() if before.get(name) != value}  # by imports
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps those that watch a command
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if listener not in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    watch(connection, made)


def watch(connection: socket.socket, made: Mapping[str, str]) -> None:
    """Fork the command and tell its number and, once it has ended, its status; returns in the command, when it did."""
    message, streams, _, _ = socket.recv_fds(connection, MESSAGE, 2)
    command, words, folder, environment = json.loads(message)
    number = os.fork()
    if number:
        connection.send(str(number).encode())
        _, status = os.waitpid(number, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(made | environment)
    sys.argv = [str(Path(sys.executable).parent / command), *words]
    importlib.import_module(ENTRIES[command]).main()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    serve(sys.argv[1])
