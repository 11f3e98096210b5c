"""How far packing is, and how to show it: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_EVERY = 10.0  # seconds between lines where there is no terminal

_TITLES = {"stage": ("reading scenes", "scenes"), "assemble": ("writing shards", "shards")}


@dataclass(frozen=True)
class Work:
    """What a task has done: tiles, and the bytes that they take encoded."""

    tiles: int
    bytes: int


@dataclass(frozen=True)
class State:
    """Where a step of packing stands."""

    step: str  # "stage": scenes are read and encoded, or "assemble": shards are written
    done: int  # scenes or shards that are finished, those of an earlier run included
    total: int
    tiles: int  # of what this run has finished
    bytes: int
    seconds: float  # that this step has run
    left: float | None  # seconds that the rest of this step will take at the pace so far; None: nothing to go by

    @property
    def line(self) -> str:
        """One plain sentence."""
        title, items = _TITLES[self.step]
        return f"{title}: {self.done} of {self.total} {items}, {self.pace}"

    @property
    def pace(self) -> str:
        """Tiles and megabytes a second and the time left."""
        seconds = max(self.seconds, 1e-9)
        pace = f"{self.tiles} tiles, {self.tiles / seconds:.1f} tiles/s, {self.bytes / seconds / 1e6:.1f} MB/s"
        return pace if self.left is None else f"{pace}, {_clock(self.left)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


Report = Callable[[State], None]


class Meter:
    """Counts what the tasks of a step finish; ``weights`` say how much of the step each of them is."""

    def __init__(self, step: str, total: int, kept: int, weight: float, report: Report) -> None:
        """``weight`` is the sum of the weights of all tasks that are still to run."""
        self._step, self._total, self._done, self._weight, self._report = step, total, kept, weight, report
        self._finished, self._tiles, self._bytes = 0.0, 0, 0
        self._start = time.monotonic()
        self._tell()

    def add(self, work: Work, weight: float) -> None:
        """A task is finished."""
        self._done += 1
        self._finished += weight
        self._tiles += work.tiles
        self._bytes += work.bytes
        self._tell()

    def _tell(self) -> None:
        seconds = time.monotonic() - self._start
        left = seconds * (self._weight - self._finished) / self._finished if self._finished else None
        self._report(State(self._step, self._done, self._total, self._tiles, self._bytes, seconds, left))


@contextmanager
def shown(console: Console) -> Iterator[Report]:
    """Show states on ``console``."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(state: State) -> None:
            title, items = _TITLES[state.step]
            if state.step not in tasks:
                tasks[state.step] = progress.add_task(title, text="")
            text = f"{state.done}/{state.total} {items}, {state.pace}"
            progress.update(tasks[state.step], completed=state.done, total=state.total, text=text)

        yield report


class _Lines:
    """Prints a line when a step begins, when it ends, and between at most every :data:`LINE_EVERY` seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step, self._next = "", 0.0

    def __call__(self, state: State) -> None:
        now = time.monotonic()
        if state.step != self._step or state.done == state.total or now >= self._next:
            self._console.print(state.line, markup=False, highlight=False, soft_wrap=True)
            self._step, self._next = state.step, now + LINE_EVERY
