"""The tasks of packing on an existing Dask cluster. Scheduling, retries and the dashboard are Dask's."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import platform
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import rasterio

from shards.errors import InputError
from shards.tasks import Engine

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = 60.0  # seconds for the scheduler to answer and for a worker to take a first task
_LIBRARIES = ("dctc", "rasterio", "numpy", "pillow", "pydantic", "distributed", "shapely", "pyproj", "pyogrio")


@dataclass(frozen=True)
class Surroundings:
    """What a worker must share with the process that sends it tasks."""

    versions: dict[str, str]
    files: dict[Path, int]  # absolute paths and sizes: the token in OUT, and scenes below ROOT

    def differences(self) -> str | None:
        """What is otherwise in this process, as half a sentence, or None."""
        for what, version in versions().items():
            if self.versions.get(what) != version:
                return (
                    f"has {what} {version}, but the command that sends the tasks {self.versions.get(what)}: install "
                    "the same versions everywhere (pip install -c constraints.txt)"
                )
        for path, size in self.files.items():
            if not path.is_file() or path.stat().st_size != size:
                return f"does not see {path}: OUT and ROOT must be on a file system that all machines share"
        return None


def versions() -> dict[str, str]:
    """Of all that decides the bytes or must fit to exchange tasks; ``code`` is a hash of this package's files."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    found = {name: _version(name) for name in _LIBRARIES}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **found, "gdal": rasterio.__gdal_version__, "code": code.hexdigest()[:12]}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


@dataclass
class _Wrapped:
    """A task that first makes sure, once a process, that its worker shares what it must: workers may come late."""

    function: Callable[[Any], Any]
    surroundings: Surroundings

    def __call__(self, item: Any) -> Any:
        if self.surroundings not in _CHECKED:
            difference = self.surroundings.differences()
            if difference is not None:
                raise InputError(f"the Dask worker on {platform.node()} {difference}")
            _CHECKED.append(self.surroundings)
        return self.function(item)


_CHECKED: list[Surroundings] = []  # by this process


@dataclass(frozen=True)
class Cluster:
    """An :class:`shards.tasks.Engine` on a Dask cluster."""

    address: str
    client: Any  # distributed.Client
    surroundings: Surroundings

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], done: Callable[[Item, Result], None]
    ) -> None:
        """As :class:`shards.tasks.Engine` says. Tasks of a lost worker run again on another."""
        # pure: Dask would take results of an earlier run for this one's, though files may have been deleted since.
        futures = self.client.map(_Wrapped(function, self.surroundings), items, pure=False)
        place = {future.key: item for future, item in zip(futures, items, strict=True)}
        try:
            for future in _distributed().as_completed(futures, loop=self.client.loop):
                with _cluster_errors(self.address):
                    result = future.result()
                done(place[future.key], result)
        finally:
            self.client.cancel(futures)


@contextmanager
def cluster_engine(address: str, out: Path, files: Sequence[Path]) -> Iterator[Engine]:
    """The cluster of the scheduler at ``address`` whose workers share the folder ``out`` and see ``files``.

    Raises:
        InputError: when the extra is not installed, the scheduler does not answer, no worker takes a task, or a worker
            has other versions or does not share the folders.
    """
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--dask {address}: no Dask scheduler answers there ({error})") from None
    token = out / f"token-{secrets.token_hex(8)}"
    token.write_text(token.name)
    try:
        surroundings = Surroundings(versions(), {path: path.stat().st_size for path in (token, *files)})
        _check_workers(address, client, surroundings)
        yield Cluster(address, client, surroundings)
    finally:
        token.unlink(missing_ok=True)
        client.close()


def _check_workers(address: str, client: Any, surroundings: Surroundings) -> None:
    try:
        with _cluster_errors(address):
            client.submit(_alive, pure=False).result(timeout=PATIENCE)  # also makes an adaptive cluster grow
            found = client.run(surroundings.differences)
    except (TimeoutError, _distributed().TimeoutError):
        raise InputError(
            f"--dask {address}: no worker took a task within {PATIENCE:.0f} s; start workers (dask worker {address} "
            "--nthreads 1)"
        ) from None
    except ImportError as error:
        raise InputError(f"--dask {address}: a worker cannot import dctc ({error}); install it there") from None
    for worker, difference in found.items():
        if difference is not None:
            raise InputError(f"the Dask worker {worker} {difference}")


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError:
        raise InputError("--dask needs the package distributed: pip install 'dctc[dask]'") from None


def _alive() -> bool:
    return True


@contextmanager
def _cluster_errors(address: str) -> Iterator[None]:
    """Turn failures of the cluster itself into an InputError; what tasks raise passes."""
    distributed = _distributed()
    try:
        yield
    except distributed.KilledWorker as error:
        raise InputError(
            f"--dask {address}: a task lost its worker several times, perhaps for its memory ({error}); give workers "
            "more memory and run the same command again to go on"
        ) from None
    except (distributed.comm.CommClosedError, CancelledError) as error:
        raise InputError(
            f"--dask {address}: the scheduler is gone ({error}); run the same command again to go on"
        ) from None
