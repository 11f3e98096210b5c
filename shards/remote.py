"""Datasets behind a URL: whole files fetched once a node into a cache that is bounded by bytes.

Each file has a lock, so that one downloader a node fetches it, whatever processes, loader workers and threads share the
cache, and a server that hangs holds up nobody but those who want that file. It is fetched to ``NAME.part``, hashed, and
only then gets its name; what is called ``.part`` is never read. Making room and naming happen under the cache's lock,
which nobody holds for long: ``.part`` files whose lock is free go, their writers are dead, then the least recently used
shards. A shard in use carries a shared lock (:meth:`Store.open_file`) and stays. What is in use may exceed the limit,
never block: the store says so once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from shards.errors import AccessError, InputError
from shards.files import file_sha256, write_atomic

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 64 * 2**30
ATTEMPTS = 4
PATIENCE = 0.25  # seconds before the second attempt; doubled each time
CONNECT_SECONDS, STALLED_SECONDS = 5, 20  # without a connection, without a byte
GIVE_UP = 30.0  # seconds after which no further attempt is begun
_CACHED = "*/shards/*.tar"
_warned: set[Path] = set()  # caches of which this process has said that they are too small


@dataclass(frozen=True)
class CacheSettings:
    """Where a node keeps what it fetched, and how much of it.

    Attributes:
        folder: None is DCTC_CACHE, else ``~/.cache/dctc``.
        limit: bytes of shards that may lie there.
    """

    folder: Path | None = None
    limit: int = DEFAULT_BYTES

    def resolved(self) -> Path:
        """The folder, absolute."""
        return (self.folder or Path(os.environ.get("DCTC_CACHE") or "~/.cache/dctc")).expanduser().absolute()


def is_url(location: str | Path) -> bool:
    """Whether a dataset's location is a URL rather than a folder."""
    return isinstance(location, str) and "://" in location


@dataclass(frozen=True)
class Store:
    """The files of one remote dataset. Holds no connection, so it travels to loader workers.

    Attributes:
        url: of the dataset, without a slash at the end.
        cache: the node's cache folder.
        folder: this dataset's part of it.
        limit: bytes of shards in ``cache``.
    """

    url: str
    cache: Path
    folder: Path
    limit: int

    def fetch(self, name: str, sha256: str, size: int | None = None, *, check: bool = False) -> Path:
        """The local copy of the file ``name``, fetched now unless it is there.

        Args:
            size: of a shard, its bytes, for which room is made.
            check: hash a copy that is there, and fetch it again when it is not right.

        Raises:
            InputError: when the server cannot be reached, has no such file or other bytes; names the URL.
        """
        path = self.folder / name
        if check:
            self.discard_damaged(name, sha256)
        if path.exists():
            return path
        with _locked(self._lock_of(path)):
            if not path.exists():  # another process may have fetched it meanwhile
                self._fetch(name, sha256, path, size)
        return path

    def _fetch(self, name: str, sha256: str, path: Path, size: int | None) -> None:
        """For the holder of the file's lock."""
        try:
            if size is not None:
                with _locked(self.cache / "lock"):
                    self._make_room(size, to_come=size)
            self._download(name, path, sha256)
            with _locked(self.cache / "lock"):
                if size is not None:
                    self._make_room(size, to_come=0)  # again: others may have taken it while this was on its way
                _part_of(path).replace(path)
        finally:
            _part_of(path).unlink(missing_ok=True)

    def discard_damaged(self, name: str, sha256: str) -> None:
        """Remove the local copy of a file if it is not what it should be; whoever has it open keeps what he has."""
        path = self.folder / name
        if path.exists():
            with _locked(self._lock_of(path)), suppress(FileNotFoundError):  # evicted meanwhile
                if file_sha256(path) != sha256:
                    path.unlink()

    def sha256_of(self, name: str) -> str | None:
        """sha256 of a file as it lies on the server, past the cache; None when there is none.

        Raises:
            InputError: as :meth:`fetch`, when it cannot be told.
        """
        path = self.folder / "verified" / Path(name).name
        with _locked(self._lock_of(path)):  # what a killed process leaves here goes with other parts
            try:
                return self._download(name, path)
            except MissingError:
                return None
            finally:
                _part_of(path).unlink(missing_ok=True)

    def _lock_of(self, path: Path) -> Path:
        """The lock of a file of the cache; beside the datasets, so that who removes one of them removes no lock."""
        name = path.relative_to(self.cache).as_posix().replace("/", "_")
        return self.cache / "locks" / f"{name}.lock"

    def open_file(self, name: str, sha256: str, size: int) -> FileIO:
        """The file, open for reading and safe from eviction until it is closed; raises as :meth:`fetch`."""
        while True:
            path = self.fetch(name, sha256, size)
            try:
                file = FileIO(path)
            except FileNotFoundError:  # evicted between the two
                continue
            except OSError as error:
                raise AccessError(f"{path}: cannot be opened ({error.strerror})") from None
            fcntl.flock(file, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):  # evicted just now; the open file stays whole
                os.utime(path)
            return file

    def _make_room(self, size: int, to_come: int) -> None:
        """Remove the least recently used shards that nobody uses until the limit leaves room for ``size`` bytes.

        The ``to_come`` bytes that are not there yet must also fit on the disk, which may be smaller than the limit. For
        the holder of the cache's lock.
        """
        for part in [*self.cache.glob("*/*.part"), *self.cache.glob("*/*/*.part")]:
            _remove_dead(part, self._lock_of(part.with_suffix("")))
        found = [(path.stat(), path) for path in self.cache.glob(_CACHED)]
        total = sum(stat.st_size for stat, _ in found)
        excess = max(total + size - self.limit, to_come - shutil.disk_usage(self.cache).free)
        for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
            if excess <= 0:
                return
            if _unused(path):
                path.unlink()
                excess -= stat.st_size
        if excess > 0 and self.cache not in _warned:
            _warned.add(self.cache)
            logger.warning(
                "%s: %d bytes of shards are in use at once, more than data.cache_bytes (%d) or its disk can hold: the "
                "cache exceeds it", self.cache, total + size, self.limit,
            )  # fmt: skip

    def _download(self, name: str, path: Path, sha256: str | None = None) -> str:
        """Fetch a file to the part of ``path``, again where it has another ``sha256`` than this; its sha256."""
        url, part, attempts = f"{self.url}/{name}", _part_of(path), _Attempts()
        for _ in attempts:
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                _get(url, part)
                found = file_sha256(part)
                if sha256 in (found, None):
                    return found
                attempts.problem = "its bytes are not those that the manifest names"
            except FileNotFoundError:
                raise MissingError(f"{url}: no such file; is the whole dataset there?") from None
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                    raise InputError(
                        f"{part}: cannot be written ({error.strerror}); make room there, or set data.cache"
                    ) from None
                attempts.problem = _first_line(error)
        raise InputError(f"{url}: cannot be fetched, {attempts}; try again later")


class MissingError(InputError):
    """The server has no such file."""


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


class _Attempts:
    """Some attempts with growing pauses; none begins after :data:`GIVE_UP` seconds."""

    def __init__(self) -> None:
        self.made, self.problem = 0, ""

    def __iter__(self) -> Iterator[int]:
        begun = time.monotonic()
        while self.made < ATTEMPTS and time.monotonic() - begun < GIVE_UP:
            if self.made:
                time.sleep(PATIENCE * 2 ** (self.made - 1))
            self.made += 1
            yield self.made

    def __str__(self) -> str:
        return f"{self.made} attempts failed ({self.problem})"


def open_store(location: str, settings: CacheSettings) -> tuple[Store, bytes]:
    """Reach a remote dataset: its store, and the bytes of its manifest.

    Raises:
        InputError: when there is no such dataset, or no way to reach it; names the URL.
    """
    url = location.rstrip("/")
    if "?" in url:
        raise InputError(f"{url}: files are named after the URL, which must have no query (?...) therefore")
    cache = settings.resolved()
    raw = _read(f"{url}/manifest.json")
    folder = cache / hashlib.sha256(raw).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "manifest.json"
        if not known.exists() or known.read_bytes() != raw:
            write_atomic(known, raw)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); set data.cache or DCTC_CACHE") from None
    return Store(url, cache, folder, settings.limit), raw


def fetch_index(store: Store, columns: dict[str, str]) -> None:
    """Fetch the index columns (name -> sha256); one that is there but damaged is fetched again.

    Raises:
        InputError: as :meth:`Store.fetch`.
    """
    for column, sha256 in columns.items():
        store.fetch(f"index/{column}.npy", sha256, check=True)


def _read(url: str) -> bytes:
    attempts = _Attempts()
    for _ in attempts:
        filesystem, path = _filesystem(url)
        try:
            return bytes(filesystem.cat_file(path))
        except FileNotFoundError:
            raise InputError(f"{url}: no such file, so there is no complete dataset here") from None
        except Exception as error:  # a filesystem may raise anything
            attempts.problem = _first_line(error)
    raise InputError(f"{url}: cannot be read, {attempts}; is the server there?")


def _get(url: str, part: Path) -> None:
    filesystem, path = _filesystem(url)
    try:
        filesystem.get_file(path, str(part))
    except OSError:
        raise
    except Exception as error:  # a filesystem may raise anything
        raise ConnectionError(_first_line(error)) from None


def _filesystem(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url, **_timeouts(protocol))
    except ImportError as error:
        raise InputError(
            f"{url}: datasets behind {protocol}:// need the extra `remote`: pip install 'dctc[remote]' ({error})"
        ) from None
    except ValueError as error:
        raise InputError(f"{url}: not a URL that can be read ({error})") from None
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1  # of s3fs's own; attempts of attempts would take half a minute to fail
    return filesystem, path


def _timeouts(protocol: str) -> dict[str, Any]:
    """Options that make a silent server an error; fsspec itself would wait for minutes."""
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=STALLED_SECONDS)
        return {"client_kwargs": {"timeout": limits}}
    if protocol in ("s3", "s3a"):
        retries = {"max_attempts": 1}  # we make the attempts
        return {
            "config_kwargs": {
                "connect_timeout": CONNECT_SECONDS, "read_timeout": STALLED_SECONDS, "retries": retries,
            }
        }  # fmt: skip
    return {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock; the kernel frees it when its holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise AccessError(f"{path}: cannot be written ({error.strerror}); set data.cache or DCTC_CACHE") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_dead(part: Path, lock: Path) -> None:
    """Remove what a dead process has left of a file, unless another one is fetching it now."""
    with lock.open("ab") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink(missing_ok=True)


def _unused(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
