"""Rows of a scene's maps on their way from the process that predicted them to the one that writes the files."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dctc.mapping.raster import part_of, sync
from shards.errors import InputError


class Spools:
    """One hidden file of rows for each kind of map, beside the maps; a context manager that removes them at its end.

    A file is a row of pieces: a line of JSON (``dtype``, ``shape``, ``bytes``) and the rows, compressed by zlib, which
    knows when they are damaged. Their names are temporary ones of this process, so what a killed one leaves is removed
    with its other drafts (:func:`dctc.mapping.raster.clear_stale`).

    Args:
        finals: the maps' final names by kind.

    Raises:
        InputError: when a file cannot be written.
    """

    def __init__(self, finals: Mapping[str, Path]) -> None:
        parts = {kind: part_of(final) for kind, final in finals.items()}
        self.paths = {kind: part.with_name(f"{part.name}.rows") for kind, part in parts.items()}
        self.kinds = list(self.paths)

    def __enter__(self) -> Spools:
        for path in self.paths.values():
            self._add(path, b"", "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self.paths.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def append(self, kind: str, rows: NDArray[Any]) -> None:
        """Add rows [bands, n, width] below those already added."""
        data = zlib.compress(np.ascontiguousarray(rows).data, 1)
        head = {"dtype": rows.dtype.str, "shape": rows.shape, "bytes": len(data)}
        self._add(self.paths[kind], json.dumps(head).encode() + b"\n" + data)

    def finish(self) -> dict[str, tuple[str, int]]:
        """Put the files on the disk; their names and sizes by kind."""
        for path in self.paths.values():
            sync(path)
        return {kind: (path.name, path.stat().st_size) for kind, path in self.paths.items()}

    @staticmethod
    def _add(path: Path, data: bytes, mode: str = "ab") -> None:
        try:
            with path.open(mode) as file:
                file.write(data)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written; choose a folder that is writable and has room: {error.strerror}"
            ) from None


def spooled(path: Path, size: int) -> Iterator[NDArray[Any]]:
    """The pieces of a file of :class:`Spools`, in their order; raises :class:`InputError` unless it is whole."""
    try:
        if (found := path.stat().st_size) != size:
            raise ValueError(f"{found} bytes instead of {size}")
        with path.open("rb") as file:
            while line := file.readline():
                head = json.loads(line)
                data = zlib.decompress(file.read(head["bytes"]))
                yield np.frombuffer(data, head["dtype"]).reshape(head["shape"])
    except (OSError, ValueError, zlib.error) as error:
        raise InputError(
            f"{path}: rows of another process cannot be read; all processes need the same folder: {error}"
        ) from None
