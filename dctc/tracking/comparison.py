"""One table of a comparison: its cells, what its rows cost, and their order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from dctc.tracking import paper
from dctc.tracking.found import FoundRun

NETS = ("s1", "ema", "mean", "teacher", "s2")  # in this order, after the headline
SPELLED = {"miou": "mIoU", "iou": "IoU", "pa": "PA", "mpa": "MPA", "f1": "F1", "fwiou": "fwIoU"}
CLASSES = "class"  # the axis of a table of classes


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
        row_order: of a table of classes: the dataset's.
        column_order: the columns that come first.
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
    row_order: tuple[str, ...] = ()
    column_order: tuple[str, ...] = ()

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
        """Column values: those of ``column_order``, then shares in order of size."""
        columns = {column for _, _, column in self.cells}
        return sorted(columns, key=lambda column: ((*self.column_order, column).index(column), *order(column)))

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(row value, net): rows in ``row_order``, else the paper's, then by name; of each the headline first."""
        pairs = {(row, net) for row, net, _ in self.cells}
        return sorted(
            pairs,
            key=lambda pair: (
                (*self.row_order, pair[0]).index(pair[0]), _place(pair[0]), *order(pair[0]), self._turn(*pair), pair[1]
            ),
        )  # fmt: skip

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
