"""The progress of a run: a bar with losses, tiles/s and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Console:
    """Where the main rank tells how far it is; the other ranks stay silent.

    Args:
        total: rounds of the run.
        done: rounds done before this process started.
    """

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        self.total, self.done, self.enabled = total, done, enabled
        self._out = RichConsole(file=sys.stdout, soft_wrap=True, highlight=False)
        # The losses come last: a narrow terminal cuts them, not the bar and the time left.
        columns = (
            BarColumn(12, table_column=Column(min_width=12)),
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total)) + 1)),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        self._bar = Progress(*columns, console=self._out, expand=True) if enabled and self._out.is_terminal else None
        self._task = self._bar.add_task("", total=total, completed=done) if self._bar else None
        if self._bar:
            self._bar.start()

    def round(self, done: int) -> None:
        """Move the bar."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done)

    def metrics(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a log step."""
        losses = " ".join(
            f"{key.rsplit('/', 1)[-1]} {value:.4f}" for key, value in metrics.items() if key.startswith("train/loss/")
        )
        speed = f"{metrics['perf/tiles_per_s']:.1f} tiles/s"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, description=f"{speed} | {losses}")
        else:
            left = duration((self.total - done) / metrics["perf/rounds_per_s"])
            self.line(f"round {done}/{self.total} | {losses} | {speed} | {left} left")

    def line(self, text: str) -> None:
        """One line above the bar."""
        if self.enabled:
            self._out.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()
