"""Tables of finished runs, from MLflow alone: the mean and the spread over seeds of the test score of each net."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dctc.tracking.journal import write_atomically
from dctc.tracking.remote import load_mlflow, shown
from shards.errors import InputError
from shards.manifest import parse_share

if TYPE_CHECKING:
    from mlflow.entities import Run

NETS = ("s1", "mean", "teacher")
TAGS = {"share": "labelled_share"}  # short names of axes; any other axis is a tag of that name
# Parameters in which runs may differ and still measure the same thing.
NEUTRAL = (
    "run.",
    "tracking.",
    "parallel.strategy",
    "evaluation.",
    "data.dataset",
    "data.workers",
    "data.prefetch",
    "data.cache",
)


@dataclass(frozen=True)
class Cell:
    """Test scores by seed, as fractions of 1."""

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{spread} ({len(self.scores)})"


@dataclass(frozen=True)
class Comparison:
    """One table: the runs of one experiment on one dataset digest. Cells are by (row, net, column)."""

    experiment: str
    digest: str
    metric: str
    axes: tuple[str, str]
    cells: Mapping[tuple[str, str, str], Cell]
    notes: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """Column values, shares in order of size."""
        return sorted({column for _, _, column in self.cells}, key=_order)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(row value, net), each method's nets together in the order of :data:`NETS`."""
        pairs = {(row, net) for row, net, _ in self.cells}
        return sorted(pairs, key=lambda pair: (*_order(pair[0]), (*NETS, pair[1]).index(pair[1]), pair[1]))

    def table(self) -> Table:
        """For a terminal: percent, mean ± standard deviation (seeds), the best of each column in bold."""
        title = f"{self.experiment}: test {self.metric} in %, mean ± std (seeds)\ndataset {self.digest[:12]}"
        table = Table(title=title, caption="\n".join(self.notes) or None, caption_justify="left")
        for column in (self.axes[0], "net", *self.columns):
            table.add_column(column, justify="right" if column in self.columns else "left")
        best = {c: max(cell.mean for key, cell in self.cells.items() if key[2] == c) for c in self.columns}
        previous = None
        for row, net in self.rows:
            if previous not in (None, row):
                table.add_section()
            texts = [Text("–", style="dim")] * len(best)
            for position, column in enumerate(best):
                if cell := self.cells.get((row, net, column)):
                    texts[position] = Text(str(cell), style="bold" if cell.mean == best[column] else "")
            table.add_row("" if row == previous else row, net, *texts)
            previous = row
        return table


def compare(
    uri: str,
    experiment: str | None = None,
    rows: str = "method",
    cols: str = "share",
    metric: str = "miou",
    nets: Sequence[str] = NETS,
) -> list[Comparison]:
    """The finished runs of ``experiment`` as tables, one for each dataset digest: scores on different tiles never mix.

    ``experiment`` may be None when the server has one only; ``rows`` and ``cols`` are tags, or ``share``. Of several
    runs of one row, column, seed and digest the latest counts.

    Raises:
        InputError: when there is no such experiment, or no finished run with a test score in it.
    """
    keys = {net: f"test/{net}/{metric}" for net in nets}
    name, runs = _finished(uri, experiment)
    by_digest: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if any(key in run.data.metrics for key in keys.values()):
            by_digest[_value(run, "dataset_digest")].append(run)
    if not by_digest:
        raise InputError(f"experiment {name!r} at {shown(uri)} has no finished run with a test {metric}")
    tables = []
    for digest, found in sorted(by_digest.items()):
        cells, notes = _cells(found, (TAGS.get(rows, rows), TAGS.get(cols, cols)), keys)
        tables.append(Comparison(name, digest, metric, (rows, cols), cells, notes))
    return tables


def write_csv(comparisons: Iterable[Comparison], path: Path) -> None:
    """All cells, one a line, unrounded fractions of 1. Atomic."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["experiment", "dataset_digest", "row", "net", "column", "metric", "mean", "std", "seeds"])
    for table in comparisons:
        for (row, net, column), cell in sorted(table.cells.items()):
            key = [table.experiment, table.digest, row, net, column, table.metric]
            writer.writerow([*key, cell.mean, cell.std, len(cell.scores)])  # floats by repr, None as an empty cell
    write_atomically(path, text.getvalue().encode())


def _cells(
    runs: Sequence[Run], axes: tuple[str, str], keys: Mapping[str, str]
) -> tuple[dict[tuple[str, str, str], Cell], tuple[str, ...]]:
    """Cells by (row, net, column), and what a reader must know of them."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: int(run.info.start_time)):
        groups[_value(run, axes[0]), _value(run, axes[1])].append(run)
    notes, cells = [], {}
    for (row, column), group in groups.items():
        by_seed = {run.data.tags.get("seed", run.info.run_id): run for run in group}  # the latest
        if len(by_seed) < len(group):
            notes.append(f"{row}, {column}: {len(group) - len(by_seed)} earlier run(s) of the same seed left out")
        if mixed := _differences(group):
            notes.append(f"{row}, {column}: these runs also differ in {', '.join(mixed)}")
        for net, key in keys.items():
            if scores := tuple(run.data.metrics[key] for run in by_seed.values() if key in run.data.metrics):
                cells[row, net, column] = Cell(scores)
    return cells, tuple(notes)


def _differences(runs: Iterable[Run]) -> list[str]:
    """Names of the parameters, other than neutral ones, that are not the same in all runs."""
    params = [run.data.params for run in runs]
    keys = {key for values in params for key in values if not key.startswith(NEUTRAL)}
    return sorted(key for key in keys if len({values.get(key) for values in params}) > 1)


def _finished(uri: str, wanted: str | None) -> tuple[str, list[Run]]:
    """The experiment's name and its finished runs."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise InputError(f"{uri}: no such database; train first, or set tracking.uri or MLFLOW_TRACKING_URI")
    client = load_mlflow()(tracking_uri=uri)
    from mlflow.exceptions import MlflowException

    try:
        known = {found.name: found.experiment_id for found in client.search_experiments() if found.name != "Default"}
        wanted = next(iter(known)) if wanted is None and len(known) == 1 else wanted
        if wanted not in known:
            problem = "name an experiment" if wanted is None else f"no experiment {wanted!r}"
            raise InputError(f"{problem}: {shown(uri)} has {', '.join(sorted(known)) or 'none'}")
        runs: list[Run] = []
        token: str | None = None
        while token != "":
            page = client.search_runs([known[wanted]], "attributes.status = 'FINISHED'", page_token=token)
            runs += page
            token = page.token or ""
    except MlflowException as error:
        raise InputError(f"{shown(uri)}: MLflow cannot be read ({str(error)[:200]})") from error
    return wanted, runs


def _value(run: Run, axis: str) -> str:
    """A run's tag; a share as the fraction it is, so that 0.5 and 1/2 are one column."""
    value = str(run.data.tags.get(axis, "unknown"))
    try:
        return str(parse_share(value)) if axis == "labelled_share" else value
    except InputError:
        return value


def _order(value: str) -> tuple[float, str]:
    """Numbers and shares by size, then names."""
    try:
        return float(Fraction(value)), value
    except (ValueError, ZeroDivisionError):
        return math.inf, value
