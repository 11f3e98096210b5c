"""``metrics.jsonl``: every metric of a run, one JSON object a line, written before anything is sent anywhere.

A line is ``{"step": 120, "time": 1732300000.25, "values": {"train/lr": 0.001}}``; time is Unix seconds. JSON has no
nan or infinity, so a value that is not finite is ``null``, which every reader understands, and the line says under
``"nonfinite"`` which it was (``{"train/loss/teacher": "inf"}``). MLflow gets nan for all of them: it has a flag for
nan, but stores an infinity as 1.8e308, which flattens every plot.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Entry:
    """One line. ``values`` holds nan for every value that is not finite; ``end`` is the byte after the line."""

    step: int
    time: float
    values: Mapping[str, float]
    end: int


class Journal:
    """Appends to ``FOLDER/metrics.jsonl``.

    Opened afresh (``resumed_step`` None) the file starts empty. Opened for a run that resumes at ``resumed_step``,
    entries beyond that step are dropped first, atomically, because the run will write them again.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        self.path = folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        kept = b"" if resumed_step is None else b"".join(_lines_until(self.path, resumed_step))
        write_atomically(self.path, kept)
        self._file: BinaryIO = self.path.open("ab")

    def append(self, values: Mapping[str, float], step: int) -> None:
        """Write one line, which survives the end of this process however it comes."""
        numbers = {name: float(value) for name, value in values.items()}
        line: dict[str, object] = {
            "step": step,
            "time": round(time.time(), 3),
            "values": {name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }
        if odd := {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}:
            line["nonfinite"] = odd
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Make the file durable and close it; closing again does nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read_entries(path: Path, offset: int = 0) -> Iterator[Entry]:
    """The whole lines of a ``metrics.jsonl`` from byte ``offset`` on; a last line still being written is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = json.loads(line)
            values = {name: math.nan if value is None else value for name, value in record["values"].items()}
            yield Entry(record["step"], record["time"], values, offset)


def _lines_until(path: Path, step: int) -> Iterator[bytes]:
    start = 0
    raw = path.read_bytes() if path.exists() else b""
    for entry in read_entries(path):
        if entry.step <= step:
            yield raw[start : entry.end]
        start = entry.end


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file of these bytes; a reader sees the old file or the whole new one.

    Raises:
        OSError: as of the system, naming a file; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        error.filename = error.filename or str(path)  # a write that fails names none
        raise
