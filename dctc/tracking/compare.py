"""Tables of finished runs, from MLflow alone: the mean and the spread over seeds of the test score of each net."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from dctc.tracking import paper
from dctc.tracking.found import Found, FoundRun, find_runs
from dctc.tracking.journal import write_atomically
from dctc.tracking.remote import shown
from shards.errors import InputError
from shards.manifest import parse_share

NETS = ("s1", "ema", "mean", "teacher", "s2")  # in this order, after the headline
TAGS = {"share": "labelled_share"}  # short names of axes; any other axis is a tag of that name
SPELLED = {"miou": "mIoU", "iou": "IoU", "pa": "PA", "mpa": "MPA", "f1": "F1", "fwiou": "fwIoU"}
CLASSES = "class"  # the axis of a table of classes
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
    """Test scores by seed, as fractions of 1; ``printed`` is the paper's, in percent."""

    scores: tuple[float, ...]
    printed: float | None = None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def difference(self) -> float | None:
        """Percentage points above the paper's figure."""
        return None if self.printed is None else 100 * self.mean - self.printed

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        own = f"{100 * self.mean:.1f}{spread} ({len(self.scores)})"
        return own if self.difference is None else f"{own}, paper {self.printed:.1f}, {self.difference:+.1f}"


@dataclass(frozen=True)
class Cost:
    """What a run of a row takes: means over its runs, None where it was not logged."""

    seconds: float | None
    gflop: float | None
    memory_gib: float | None

    def __str__(self) -> str:
        texts = (
            (self.seconds, "{:.0f} s"),
            (self.gflop, "{:.1f} GFLOP/round"),
            (self.memory_gib, "{:.2f} GiB"),
        )
        return ", ".join(text.format(value) for value, text in texts if value is not None)


@dataclass(frozen=True)
class Comparison:
    """One table: the runs of one experiment on one dataset digest.

    Attributes:
        axes: what the rows and the columns are.
        cells: by (row, net, column).
        headlines: row -> the net whose score is the method's. These compete for the best of a column.
        costs: row -> cost.
        runs: (row, column) -> the runs that count.
    """

    experiment: str
    digest: str
    metric: str
    axes: tuple[str, str]
    cells: Mapping[tuple[str, str, str], Cell]
    notes: tuple[str, ...]
    headlines: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    runs: Mapping[tuple[str, str], Sequence[FoundRun]] = field(default_factory=dict)
    subject: str = ""

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.experiment}: {self.subject}test {self.measure} in %, mean ± std (seeds)"

    @property
    def measure(self) -> str:
        """The metric as people write it."""
        return SPELLED.get(self.metric, self.metric)

    @property
    def columns(self) -> list[str]:
        """Column values, shares in order of size."""
        return sorted({column for _, _, column in self.cells}, key=order)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(row value, net): rows in the paper's order, then by name; of each the headline first."""
        pairs = {(row, net) for row, net, _ in self.cells}
        return sorted(pairs, key=lambda pair: (_place(pair[0]), *order(pair[0]), self._turn(*pair), pair[1]))

    def is_headline(self, row: str, net: str) -> bool:
        """Whether this net's score is the row's."""
        return net == self.headlines.get(row, net)

    def best(self, column: str) -> float:
        """The best mean of a column among the headlines; nan without one, and in a table of classes."""
        if self.axes[0] == CLASSES:
            return math.nan
        means = [c.mean for (row, net, at), c in self.cells.items() if at == column and self.is_headline(row, net)]
        return max(means, default=math.nan)

    def _turn(self, row: str, net: str) -> int:
        return -1 if self.is_headline(row, net) else (*NETS, net).index(net)


def compare(
    uri: str,
    experiment: str | None = None,
    rows: str | None = None,
    cols: str = "share",
    metric: str = "miou",
    nets: Sequence[str] | None = None,
    sweep: str | None = None,
    beside: str | None = None,
) -> list[Comparison]:
    """The finished runs of ``experiment`` as tables, one for each dataset digest: scores on different tiles never mix.

    Of several runs of one row, column, seed, digest and settings the latest counts. Runs of one row and column that
    differ in a setting that matters become rows of their own, which name it.

    Args:
        rows, cols: tags, or ``share``. Rows are by default ``row`` where all runs have it (those of a sweep do), else
            methods.
        nets: which nets; by default all that were tested.
        beside: the paper's dataset whose figures stand beside one's own.

    Raises:
        InputError: when there is no such experiment or sweep, or no finished run with a test score in it.
    """
    found = find_runs(uri, experiment, sweep)
    by_digest = _tested(found, metric, nets)
    return [_table(found, runs, digest, (rows, cols), metric, nets, beside) for digest, runs in by_digest.items()]


def compare_classes(
    uri: str,
    experiment: str | None = None,
    cols: str = "share",
    sweep: str | None = None,
    beside: str | None = None,
    row: str | None = None,
) -> list[Comparison]:
    """IoU by class of each row's headline, as in the paper's table 2: a table for each row (or ``row``) and digest.

    Raises:
        InputError: as :func:`compare`, or there is no such row.
    """
    found = find_runs(uri, experiment, sweep)
    tables = []
    names: set[str] = set()
    for digest, runs in _tested(found, "miou", None).items():
        whole = _table(found, runs, digest, (None, cols), "miou", None, None)
        for name in dict.fromkeys(name for name, _ in whole.rows):
            names.add(name)
            if row in (None, name):
                tables.append(_class_table(whole, name, beside))
    if not tables:
        raise InputError(f"no row {row!r} in experiment {found.experiment!r}; there are {', '.join(sorted(names))}")
    return tables


def write_csv(comparisons: Iterable[Comparison], path: Path) -> None:
    """All cells, one a line, unrounded fractions of 1. Atomic."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["experiment", "dataset_digest", "subject", "row", "net", "column", "metric", "mean", "std", "seeds", "paper"]
    )
    for table in comparisons:
        for (row, net, column), cell in sorted(table.cells.items()):
            key = [table.experiment, table.digest, table.subject.rstrip(": "), row, net, column, table.metric]
            printed = None if cell.printed is None else cell.printed / 100
            writer.writerow([*key, cell.mean, cell.std, len(cell.scores), printed])  # None as an empty cell
    write_atomically(path, text.getvalue().encode())


def _tested(found: Found, metric: str, nets: Sequence[str] | None) -> dict[str, list[FoundRun]]:
    """Digest -> finished runs with a test score."""
    by_digest: dict[str, list[FoundRun]] = defaultdict(list)
    for run in found.finished:
        if any(run.score(net, metric) is not None for net in nets or _nets(run, metric)):
            by_digest[run.digest].append(run)
    if not by_digest:
        raise InputError(
            f"experiment {found.experiment!r} at {shown(found.uri)} has no finished run with a test {metric}"
        )
    return dict(sorted(by_digest.items()))


def _nets(run: FoundRun, metric: str) -> list[str]:
    parts = [key.split("/") for key in run.metrics if key.startswith("test/")]
    return [part[1] for part in parts if len(part) == 3 and part[2] == metric]


def _table(
    found: Found,
    runs: Sequence[FoundRun],
    digest: str,
    axes: tuple[str | None, str],
    metric: str,
    nets: Sequence[str] | None,
    beside: str | None,
) -> Comparison:
    row_of, row_axis = _row_axis(runs, axes[0])
    groups: dict[tuple[str, str], list[FoundRun]] = defaultdict(list)
    for run in runs:
        groups[row_of(run), _value(run, TAGS.get(axes[1], axes[1]))].append(run)
    groups, notes = _separated(groups)
    counted: dict[tuple[str, str], Sequence[FoundRun]] = {}
    cells: dict[tuple[str, str, str], Cell] = {}
    headlines: dict[str, str] = {}
    for (row, column), group in groups.items():
        by_seed = {run.tags.get("seed", run.id): run for run in group}  # the latest
        if len(by_seed) < len(group):
            notes.append(f"{row}, {column}: {len(group) - len(by_seed)} earlier run(s) of the same seed left out")
        counted[row, column] = list(by_seed.values())
        headlines[row] = group[-1].headline
        for net in nets or dict.fromkeys(net for run in by_seed.values() for net in _nets(run, metric)):
            scores = [score for run in by_seed.values() if (score := run.score(net, metric)) is not None]
            known = beside is not None and metric == "miou" and net == headlines[row]
            if scores:
                cells[row, net, column] = Cell(
                    tuple(scores), paper.printed(beside, row, column) if beside and known else None
                )
    notes += _unfinished(found, digest)
    costs = {row: _cost([run for (r, _), group in counted.items() if r == row for run in group]) for row in headlines}
    return Comparison(
        found.experiment, digest, metric, (row_axis, axes[1]), cells, tuple(notes), headlines, costs, counted
    )


def _row_axis(runs: Sequence[FoundRun], axis: str | None) -> tuple[Callable[[FoundRun], str], str]:
    """What a run's row is, and what to call that."""
    if axis is None and all("row" in run.tags for run in runs):
        axis = "row"
    if axis not in (None, "method"):
        tag = TAGS.get(axis, axis)
        return lambda run: _value(run, tag), axis
    networks = {run.tags.get("network", "unet") for run in runs}

    def method(run: FoundRun) -> str:
        name, network = _value(run, "method"), run.tags.get("network", "unet")
        return name if len(networks) == 1 else f"{name}, {network}"

    return method, "method"


def _separated(
    groups: Mapping[tuple[str, str], list[FoundRun]],
) -> tuple[dict[tuple[str, str], list[FoundRun]], list[str]]:
    """Rows in which runs of one cell differ in settings, divided by these; notes about those that were."""
    mixed: dict[str, set[str]] = defaultdict(set)
    for (row, _), group in groups.items():
        mixed[row] |= _differences(group)
    divided: dict[tuple[str, str], list[FoundRun]] = defaultdict(list)
    for (row, column), group in groups.items():
        for run in group:
            values = [f"{key}={run.params.get(key, 'unset')}" for key in sorted(mixed[row])]
            divided[f"{row} [{', '.join(values)}]" if values else row, column].append(run)
    notes = [
        f"{row}: its runs differ in {', '.join(sorted(keys))}, so it has several rows"
        for row, keys in mixed.items() if keys
    ]  # fmt: skip
    return dict(divided), notes


def _differences(runs: Iterable[FoundRun]) -> set[str]:
    """Names of the parameters, other than neutral ones, that are not the same in all runs."""
    params = [run.params for run in runs]
    keys = {key for values in params for key in values if not key.startswith(NEUTRAL)}
    return {key for key in keys if len({values.get(key) for values in params}) > 1}


def _unfinished(found: Found, digest: str) -> list[str]:
    """Of each status that is not FINISHED, how many runs, and some names."""
    by_status: dict[str, list[str]] = defaultdict(list)
    for run in found.others:
        if run.digest == digest:
            by_status[run.status].append(run.name)
    return [
        f"{len(names)} run(s) {status.lower()}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for status, names in sorted(by_status.items())
    ]


def _cost(runs: Sequence[FoundRun]) -> Cost:
    def mean(key: str) -> float | None:
        values = [run.metrics[key] for run in runs if key in run.metrics]
        return statistics.fmean(values) if values else None

    return Cost(mean("perf/train_seconds"), mean("perf/round_gflop"), mean("perf/peak_memory_gib"))


def _class_table(whole: Comparison, row: str, beside: str | None) -> Comparison:
    net = whole.headlines[row]
    prefix = f"test/{net}/iou/"
    cells = {}
    for (name, column), runs in whole.runs.items():
        if name != row:
            continue
        labels = [key.removeprefix(prefix) for run in runs for key in run.metrics if key.startswith(prefix)]
        for label in dict.fromkeys(labels):
            scores = tuple(run.metrics[prefix + label] for run in runs if prefix + label in run.metrics)
            known = beside is not None and paper.ROWS.get(row, row) == "Ours"
            printed = paper.printed_class(beside, label, column) if beside and known else None
            cells[label, net, column] = Cell(scores, printed)
    return Comparison(
        whole.experiment, whole.digest, "iou", (CLASSES, whole.axes[1]), cells, (),
        {label: net for label, _, _ in cells}, subject=f"{row}: ",
    )  # fmt: skip


def _value(run: FoundRun, axis: str) -> str:
    """A run's tag; a share as the fraction it is, so that 0.5 and 1/2 are one column."""
    value = str(run.tags.get(axis, "unknown"))
    try:
        return str(parse_share(value)) if axis == "labelled_share" else value
    except InputError:
        return value


def _place(row: str) -> int:
    """The paper's rows in the paper's order, others after them."""
    known = [*paper.TABLE_1["potsdam"], *paper.TABLE_3["potsdam"]]
    names = [*dict.fromkeys(name for name in known if name != "Ours"), "Ours"]
    return (*names, row).index(row)


def order(value: str) -> tuple[float, str]:
    """Numbers and shares by size, then names."""
    try:
        return float(Fraction(value)), value
    except (ValueError, ZeroDivisionError):
        return math.inf, value
