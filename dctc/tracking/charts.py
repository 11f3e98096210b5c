"""Curves: the score over the labelled share (the paper's figure 6), and histories, as SVG or PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from dctc.tracking.comparison import Comparison
from dctc.tracking.journal import write_atomically
from shards.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#777777",
          "#7b3fa0", "#78a800", "#e0457b", "#00a3a3", "#b3412e")  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 300, 50, 46, 14
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        points: x, y and half the height of the error bar (0: none).
        dashed: a level across the whole chart; it has one point.
        printed: the paper's figures: fainter, and open marks without a line. It follows one's own.
    """

    name: str
    points: Sequence[tuple[float, float, float]]
    dashed: bool = False
    printed: bool = False


def figure6(comparison: Comparison) -> list[Series]:
    """The headline score in percent over the labelled share of every row: a curve, or a single mark.

    Rows with all labels alone (the supervised baselines) are left out, but for the U-Net, a dashed level. The paper
    draws its figure 6 without numbers: beside one's own stand those that it prints in table 1.
    """
    lines = []
    for row, net in comparison.rows:
        if not comparison.is_headline(row, net):
            continue
        points, printed = [], []
        for column in comparison.columns:
            cell = comparison.cells.get((row, net, column))
            if cell is not None and _share(column) is not None:
                share = 100 * float(Fraction(column))
                points.append((share, 100 * cell.mean, 100 * (cell.std or 0.0)))
                if cell.printed is not None:
                    printed.append((share, cell.printed, 0.0))
        if points and points[-1][0] == 100 and _is_unet(comparison, row):
            lines.append(Series(f"{row}, all labels", points[-1:], dashed=True))
            lines += [Series(f"{row}, all labels, paper", printed[-1:], dashed=True, printed=True)] if printed else []
        if points and points[0][0] < 100:
            lines.append(Series(row, points))
            lines += [Series(f"{row}, paper", printed, printed=True)] if printed else []
    return lines


def _is_unet(comparison: Comparison, row: str) -> bool:
    """Whether a row is the plain U-Net trained on labels alone."""
    runs = [run for (name, _), group in comparison.runs.items() if name == row for run in group]
    return all(
        run.tags.get("method") == "supervised"
        and run.tags.get("network", "unet") == "unet"
        and run.params.get("method.attention", "false") == "false"
        for run in runs
    )


def is_curve(lines: Sequence[Series]) -> bool:
    """Whether there is anything to draw but levels and single marks."""
    return any(len(line.points) > 1 and not line.printed for line in lines)


def write_figure6(comparisons: Sequence[Comparison], path: Path) -> None:
    """A PNG or SVG file with a chart for each comparison that has curves. Atomic.

    Raises:
        InputError: no row has two shares, or the file's name ends otherwise.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: a figure is a .png or a .svg file")
    charts = [(table, lines) for table in comparisons if is_curve(lines := figure6(table))]
    if not charts:
        raise InputError("no method has runs at two or more labelled shares: nothing to draw as a curve")
    figure = Figure(figsize=(7 * len(charts), 4.6), dpi=130, layout="constrained")
    grid = figure.subplots(1, len(charts), squeeze=False)
    for axes, (table, lines) in zip(grid[0], charts, strict=True):
        _draw(axes, table, lines, several=len(comparisons) > 1)
    data = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "dctc"}):  # the same file for the same figures
        figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, data.getvalue())


def _draw(axes: Axes, table: Comparison, lines: Sequence[Series], several: bool) -> None:
    for line, color in _colored(lines):
        x, y, error = zip(*line.points, strict=True)
        name = _plain(line.name)
        if line.dashed:
            axes.axhline(y[0], ls="--", color=color, lw=1.3, alpha=0.5 if line.printed else 1, label=name)
        elif line.printed:
            axes.plot(x, y, "o", ms=6, mfc="none", color=color, label=name)
        else:
            axes.errorbar(x, y, error if any(error) else None, fmt="o-", ms=4, capsize=3, color=color, label=name)
    title = f"{table.experiment}, dataset {table.digest[:12]}" if several else table.experiment
    axes.set(xlabel="labelled share, %", ylabel=f"test {table.measure}, %", title=_plain(title))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def _plain(text: str) -> str:
    """A name as matplotlib shows it letter by letter: dollars are no mathematics."""
    return text.replace("$", r"\$")


def _colored(lines: Sequence[Series]) -> list[tuple[Series, str]]:
    """Each with its colour; what the paper prints has that of one's own line, which stands before it."""
    found: list[tuple[Series, str]] = []
    own = -1
    for line in lines:
        own += not line.printed
        found.append((line, COLORS[max(own, 0) % len(COLORS)]))
    return found


def svg(lines: Sequence[Series], x_label: str, y_label: str) -> str:
    """A chart as one ``<svg>`` element with text in the page's own colour; names are escaped."""
    points = [point for line in lines for point in line.points]
    left, right = _range([x for x, _, _ in points], 0.02)
    low, high = _range([y + sign * error for _, y, error in points for sign in (-1, 1)], 0.06)

    def across(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 10)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = []
    for y in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts += [
        f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
        for x in _ticks(left, right)
    ]
    for line, color in _colored(lines):
        parts += _drawn(line, color, across, down)
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    keys = "".join(
        f'<li><span class="{_mark(line)}" style="border-color:{color};background-color:{color}"></span>'
        f"{escape(line.name)}</li>"
        for line, color in _colored(lines)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">{"".join(parts)}</svg>'
    return f'<figure><figcaption>{escape(y_label)}</figcaption>{picture}<ul class="key">{keys}</ul></figure>'


def _mark(line: Series) -> str:
    """The class of a line's mark in the key."""
    return "dashed" if line.dashed else "open" if line.printed else "line"


def _drawn(line: Series, color: str, across: Scale, down: Scale) -> list[str]:
    if line.dashed:
        y = down(line.points[0][1])
        style = f'stroke="{color}" stroke-dasharray="6 4" stroke-width="1.5" opacity="{0.5 if line.printed else 1}"'
        return [f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" {style}/>']
    places = [(across(x), down(y)) for x, y, _ in line.points]
    if line.printed:
        mark = f'r="4" fill="none" stroke="{color}" stroke-width="1.5"'
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" {mark}/>' for x, y in places]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
    for (x, y), (_, value, error) in zip(places, line.points, strict=True):
        if error:
            ends = f'y1="{down(value - error):.1f}" y2="{down(value + error):.1f}"'
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{color}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    return parts


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 1, high + 1
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Some round numbers in the range."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [round(step * k, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _share(column: str) -> Fraction | None:
    try:
        return Fraction(column)
    except (ValueError, ZeroDivisionError):
        return None
