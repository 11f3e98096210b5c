"""Tables of finished runs, from MLflow alone: the mean and the spread over seeds of the test score of each net."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dctc.tracking import paper
from dctc.tracking.comparison import CLASSES, Cell, Comparison, Cost
from dctc.tracking.found import Found, FoundRun, find_runs
from dctc.tracking.remote import shown
from dctc.tracking.settings import separate, unequal
from shards.errors import InputError
from shards.manifest import parse_share

TAGS = {"share": "labelled_share"}  # short names of axes; any other axis is a tag of that name
HEADLINE = "headline"  # each run's own, where those of a row differ


@dataclass(frozen=True)
class _Wish:
    """What a table is to show: as the arguments of :func:`compare`."""

    rows: str | None
    cols: str
    metric: str = "miou"
    nets: Sequence[str] | None = None
    beside: str | None = None


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
    differ in a setting that matters become rows of their own, which name it; a setting that differs between rows or
    columns is a note.

    Args:
        rows, cols: tags, or ``share``. Rows are by default ``row`` where all runs have it (those of a sweep do), else
            methods.
        nets: which nets; by default all that were tested.
        beside: the paper's dataset whose figures stand beside one's own.

    Raises:
        InputError: when there is no such experiment, sweep or tag, or no finished run with a test score.
    """
    return _tables(find_runs(uri, experiment, sweep), _Wish(rows, cols, metric, nets, beside))


def compare_classes(
    uri: str,
    experiment: str | None = None,
    rows: str | None = None,
    cols: str = "share",
    sweep: str | None = None,
    beside: str | None = None,
    row: str | None = None,
) -> list[Comparison]:
    """IoU by class of each row's headline, as in the paper's table 2: a table for each row (or ``row``) and digest.

    Notes stand at the first table of a digest. Rows whose runs have no scores by class are left out.

    Raises:
        InputError: as :func:`compare`, or there is no such row.
    """
    found = find_runs(uri, experiment, sweep)
    tables: list[Comparison] = []
    names: dict[str, None] = {}
    for whole in _tables(found, _Wish(rows, cols)):
        own = []
        for name in dict.fromkeys(name for name, _ in whole.rows):
            names[name] = None
            if row in (None, name) and (table := _class_table(whole, name, beside)).cells:
                own.append(table)
        tables += [replace(table, notes=whole.notes if table is own[0] else ()) for table in own]
    if row not in (None, *names):
        raise InputError(f"no row {row!r} in experiment {found.experiment!r}; there are {', '.join(names)}")
    return tables


def side_by_side(tables: Sequence[Comparison], beside: str | None = None) -> list[Comparison]:
    """IoU by class of the headlines of all rows, and their score: of tables by share a table for each share.

    Notes stand at the first one of a digest. Rows whose runs have no scores by class are left out.
    """
    found = []
    for whole in tables:
        by_row = {row: _class_table(whole, row, beside) for row in dict.fromkeys(row for row, _ in whole.rows)}
        classes = tuple(dict.fromkeys(label for table in by_row.values() for label in table.row_order))
        notes = whole.notes
        for share in whole.columns:
            cells = {
                (row, net, label): cell
                for row, table in by_row.items()
                for (label, net, column), cell in table.cells.items()
                if column == share
            }
            if not cells:
                continue
            scores = {
                (row, net, whole.measure): whole.cells[row, net, share]
                for row, net in {key[:2] for key in cells}
                if (row, net, share) in whole.cells
            }
            found.append(
                Comparison(
                    whole.experiment, whole.digest, "iou", (whole.axes[0], CLASSES), cells | scores, notes,
                    whole.headlines, subject=f"share {share}: ", column_order=(whole.measure, *classes),
                )
            )  # fmt: skip
            notes = ()
    return found


def _tables(found: Found, wish: _Wish) -> list[Comparison]:
    """A table for each digest that has a finished run with a test score."""
    by_digest: dict[str, list[FoundRun]] = defaultdict(list)
    untested = []
    for run in found.finished:
        if any(run.score(net, wish.metric) is not None for net in wish.nets or _nets(run, wish.metric)):
            by_digest[run.digest].append(run)
        else:
            untested.append(run)
    if not by_digest:
        known = sorted({key.split("/")[2] for run in found.finished for key in run.metrics if _is_score(key)})
        raise InputError(
            f"experiment {found.experiment!r} at {shown(found.uri)} has no finished run with a test {wish.metric}; "
            f"its finished runs have {', '.join(known) or 'no test scores'}"
        )
    tables = []
    for digest, runs in sorted(by_digest.items()):
        table = _table(found, runs, digest, wish)
        left = [run for run in (*untested, *found.others) if run.digest == digest or run.digest not in by_digest]
        tables.append(replace(table, notes=(*table.notes, *_left_out(left, wish.metric))))
    return tables


def _is_score(key: str) -> bool:
    return key.startswith("test/") and key.count("/") == 2


def _nets(run: FoundRun, metric: str) -> list[str]:
    return [key.split("/")[1] for key in run.metrics if _is_score(key) and key.endswith(f"/{metric}")]


def _table(found: Found, runs: Sequence[FoundRun], digest: str, wish: _Wish) -> Comparison:
    row_of, row_axis = _row_axis(runs, wish.rows)
    tag = _known_tag(runs, wish.cols)
    groups: dict[tuple[str, str], list[FoundRun]] = defaultdict(list)
    for run in runs:
        groups[row_of(run), _value(run, tag)].append(run)
    separated = separate(groups)
    notes = [*separated.notes, *unequal(separated)]
    headlines: dict[str, str] = {}
    for (row, _), group in separated.groups.items():
        names = {run.headline for run in group} | {headlines.get(row, group[0].headline)}
        headlines[row] = names.pop() if len(names) == 1 else HEADLINE
    counted: dict[tuple[str, str], Sequence[FoundRun]] = {}
    cells: dict[tuple[str, str, str], Cell] = {}
    for (row, column), group in separated.groups.items():
        by_seed = {run.tags.get("seed", run.id): run for run in group}  # the latest
        if len(by_seed) < len(group):
            notes.append(f"{row}, {column}: {len(group) - len(by_seed)} earlier run(s) of the same seed left out")
        counted[row, column] = chosen = list(by_seed.values())
        logged = [net for run in chosen for net in _nets(run, wish.metric)]
        for net in wish.nets or dict.fromkeys([headlines[row], *logged]):
            scores = [score for run in chosen if (score := run.score(_net_of(run, net), wish.metric)) is not None]
            if scores:
                printed = None
                if wish.beside and wish.metric == "miou" and net == headlines[row]:
                    printed = _printed(wish.beside, chosen[0], column, row_axis, separated.keys[row])
                cells[row, net, column] = Cell(tuple(scores), printed)
    if wish.beside and all(cell.printed is None for cell in cells.values()):
        notes.append(f"the paper has no figure for any of these cells ({wish.beside})")
    costs = {row: _cost([run for (r, _), group in counted.items() if r == row for run in group]) for row in headlines}
    return Comparison(
        found.experiment, digest, wish.metric, (row_axis, wish.cols), cells, tuple(notes), headlines, costs, counted
    )


def _net_of(run: FoundRun, net: str) -> str:
    return run.headline if net == HEADLINE else net


def _printed(dataset: str, run: FoundRun, column: str, axis: str, divided: frozenset[str]) -> float | None:
    """The paper's figure beside a cell of runs like ``run``; none where a row is a variant that the paper lacks."""
    variant = {key for key in divided if key.startswith("method.")}
    if axis == "row" and not variant:
        return paper.printed(dataset, run.tags.get("row", ""), column)
    if axis == "method" and variant <= {"method.attention", "method.sharpen"}:
        name = paper.row_of(run.tags.get("method", ""), run.tags.get("network", "unet"), run.params)
        return None if name is None else paper.printed(dataset, name, column)
    return None


def _row_axis(runs: Sequence[FoundRun], axis: str | None) -> tuple[Callable[[FoundRun], str], str]:
    """What a run's row is, and what to call that."""
    if axis is None and all("row" in run.tags for run in runs):
        axis = "row"
    if axis not in (None, "method"):
        tag = _known_tag(runs, axis)
        return lambda run: _value(run, tag), axis
    networks = {run.tags.get("network", "unet") for run in runs}

    def method(run: FoundRun) -> str:
        name, network = _value(run, "method"), run.tags.get("network", "unet")
        return name if len(networks) == 1 else f"{name}, {network}"

    return method, "method"


def _known_tag(runs: Sequence[FoundRun], axis: str) -> str:
    tag = TAGS.get(axis, axis)
    known = {name for run in runs for name in run.tags if not name.startswith("mlflow.")}
    if tag not in known | {"method"}:
        raise InputError(f"no run has a tag {axis!r} to make rows or columns of; there are {', '.join(sorted(known))}")
    return tag


def _left_out(runs: Iterable[FoundRun], metric: str) -> list[str]:
    """Of each status, how many runs are in no table, and some names."""
    by_status: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        status = f"finished without a test {metric}" if run.status == "FINISHED" else run.status.lower()
        by_status[status].append(run.name)
    return [
        f"{len(names)} run(s) {status}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for status, names in sorted(by_status.items())
    ]


def _cost(runs: Sequence[FoundRun]) -> Cost:
    def mean(key: str) -> float | None:
        values = [run.metrics[key] for run in runs if key in run.metrics]
        return statistics.fmean(values) if values else None

    return Cost(mean("perf/train_seconds"), mean("perf/round_gflop"), mean("perf/peak_memory_gib"))


def _class_table(whole: Comparison, row: str, beside: str | None) -> Comparison:
    net = whole.headlines[row]
    cells: dict[tuple[str, str, str], Cell] = {}
    classes: tuple[str, ...] = ()
    for (name, column), runs in whole.runs.items():
        if name != row:
            continue
        classes = classes or runs[0].classes
        scores: dict[str, list[float]] = defaultdict(list)
        for run in runs:
            prefix = f"test/{_net_of(run, net)}/iou/"
            for key, score in run.metrics.items():
                if key.startswith(prefix):
                    scores[key.removeprefix(prefix)].append(score)
        known = beside is not None and _is_papers(runs[0], whole.axes[0], row)
        for label, values in scores.items():
            printed = paper.printed_class(beside, label, column) if beside and known else None
            cells[label, net, column] = Cell(tuple(values), printed)
    return Comparison(
        whole.experiment, whole.digest, "iou", (CLASSES, whole.axes[1]), cells, (),
        {label: net for label, _, _ in cells}, subject=f"{row}: ", row_order=classes,
    )  # fmt: skip


def _is_papers(run: FoundRun, axis: str, row: str) -> bool:
    """Whether a row is the paper's own method, of which alone it prints scores by class."""
    name = (
        row if axis == "row" else paper.row_of(run.tags.get("method", ""), run.tags.get("network", "unet"), run.params)
    )
    return name == paper.OURS


def _value(run: FoundRun, axis: str) -> str:
    """A run's tag; a share as the fraction it is, so that 0.5 and 1/2 are one column."""
    value = str(run.tags.get(axis, "unknown"))
    try:
        return str(parse_share(value)) if axis == "labelled_share" else value
    except InputError:
        return value
