"""The page of a whole comparison: tables, classes, curves and pictures, gathered from MLflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dctc.tracking.compare import Comparison
from dctc.tracking.histories import histories
from dctc.tracking.page import Extras, write_page
from dctc.tracking.panels import panels
from dctc.tracking.remote import shown


def write_report(uri: str, tables: Sequence[Comparison], classes: Sequence[Comparison], path: Path) -> None:
    """One HTML file: each table with its curves and pictures, then those of classes. Atomic."""
    extras = []
    for table in tables:
        found = panels(uri, table)
        extras.append(Extras(histories(uri, table), found.pictures, found.notes))
    command = " ".join(["dctc", *map(shown, sys.argv[1:])])  # without a password
    plain = [replace(table, notes=()) for table in classes]  # which the tables above have
    write_page([*tables, *plain], [*extras, *[Extras()] * len(plain)], command, path)
