"""The page of a whole comparison: tables, classes, curves and pictures, gathered from MLflow."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dctc.tracking.charts import write_figure6
from dctc.tracking.comparison import Comparison
from dctc.tracking.histories import histories
from dctc.tracking.page import Extras, write_page
from dctc.tracking.panels import panels
from dctc.tracking.remote import shown
from dctc.tracking.tables import write_csv, write_markdown
from shards.errors import InputError


def write_report(uri: str, tables: Sequence[Comparison], classes: Sequence[Comparison], path: Path) -> None:
    """One HTML file: each table with its curves and pictures, then those of classes. Atomic."""
    extras = []
    for table in tables:
        found = panels(uri, table)
        extras.append(Extras(histories(uri, table), found.pictures, found.notes))
    command = " ".join(["dctc", *map(shown, sys.argv[1:])])  # without a password
    plain = [replace(table, notes=()) for table in classes]  # which the tables above have
    write_page([*tables, *plain], [*extras, *[Extras()] * len(plain)], command, path)


@dataclass(frozen=True)
class Files:
    """Where a comparison goes beside the terminal; None where it does not."""

    page: Path | None = None
    cells: Path | None = None
    tables: Path | None = None
    figure: Path | None = None

    def check(self) -> None:
        """Raises :class:`InputError` where a folder is missing, before anything is read."""
        for path in (self.page, self.cells, self.tables, self.figure):
            if path is not None and not path.parent.is_dir():
                raise InputError(f"{path}: there is no folder {path.parent}")
            if path is not None and path.is_dir():
                raise InputError(f"{path}: is a folder; name a file")

    def write(
        self,
        uri: str,
        methods: Sequence[Comparison],
        classes: Sequence[Comparison],
        chosen: Sequence[Comparison],
    ) -> Iterator[str]:
        """Write them, and say of each where it is. ``chosen`` are the tables that the terminal shows."""
        if self.cells is not None:
            write_csv(chosen, self.cells)
            yield f"cells in {self.cells}"
        if self.tables is not None:
            write_markdown(chosen, self.tables)
            yield f"tables in {self.tables}"
        if self.figure is not None:
            write_figure6(methods, self.figure)
            yield f"figure in {self.figure}"
        if self.page is not None:
            write_report(uri, methods, classes, self.page)
            yield f"page in {self.page}"
