"""Curves: the score over the labelled share (the paper's figure 6), and histories, as SVG or PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path

from dctc.tracking.compare import Comparison
from dctc.tracking.journal import write_atomically
from shards.errors import InputError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#777777")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 300, 46, 40, 14
Scale = Callable[[float], float]
BASELINES = ("U-Net", "supervised")  # the dashed line of figure 6: this row at share 1


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        points: x, y and half the height of the error bar (0: none).
        dashed: a level across the whole chart; it has one point.
    """

    name: str
    points: Sequence[tuple[float, float, float]]
    dashed: bool = False


def figure6(comparison: Comparison) -> list[Series]:
    """The headline score in percent over the labelled share of every row with at least two shares.

    Rows without (the supervised baselines) are left out, but for the U-Net with all labels, a dashed level.
    """
    lines = []
    for row, net in comparison.rows:
        if not comparison.is_headline(row, net):
            continue
        points = []
        for column in comparison.columns:
            cell = comparison.cells.get((row, net, column))
            if cell is not None and _share(column) is not None:
                points.append((100 * float(Fraction(column)), 100 * cell.mean, 100 * (cell.std or 0.0)))
        if row in BASELINES and points and points[-1][0] == 100:
            lines.append(Series(f"{row}, all labels", points[-1:], dashed=True))
        if len(points) > 1:
            lines.append(Series(row, points))
    return lines


def write_figure6(comparisons: Sequence[Comparison], path: Path) -> None:
    """The chart of the first comparison as a PNG or SVG file. Atomic.

    Raises:
        InputError: no row has two shares, or the file's name ends otherwise.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: a figure is a .png or a .svg file")
    lines = figure6(comparisons[0])
    if not any(not line.dashed for line in lines):
        raise InputError("no method has runs at two or more labelled shares: nothing to draw as a curve")
    figure = Figure(figsize=(7, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for line, color in zip(lines, COLORS * len(lines), strict=False):
        x, y, error = zip(*line.points, strict=True)
        if line.dashed:
            axes.axhline(y[0], ls="--", color=color, lw=1.3, label=line.name)
        else:
            axes.errorbar(x, y, error if any(error) else None, fmt="o-", ms=4, capsize=3, color=color, label=line.name)
    axes.set(xlabel="labelled share, %", ylabel=f"test {comparisons[0].measure}, %", title=comparisons[0].experiment)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    data = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "dctc"}):  # the same file for the same figures
        figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, data.getvalue())


def svg(lines: Sequence[Series], x_label: str, y_label: str) -> str:
    """A chart as one ``<svg>`` element with text in the page's own colour; names are escaped."""
    points = [point for line in lines for point in line.points]
    left, right = _range([x for x, _, _ in points], 0.0)
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
        f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>'
        for x in _ticks(left, right)
    ]
    for line, color in zip(lines, COLORS * len(lines), strict=False):
        parts += _drawn(line, color, across, down)
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    keys = "".join(
        f'<li><span style="background:{color}"></span>{escape(line.name)}</li>'
        for line, color in zip(lines, COLORS * len(lines), strict=False)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">{"".join(parts)}</svg>'
    return f'<figure><figcaption>{escape(y_label)}</figcaption>{picture}<ul class="key">{keys}</ul></figure>'


def _drawn(line: Series, color: str, across: Scale, down: Scale) -> list[str]:
    if line.dashed:
        y = down(line.points[0][1])
        style = f'stroke="{color}" stroke-dasharray="6 4" stroke-width="1.5"'
        return [f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" {style}/>']
    places = [(across(x), down(y)) for x, y, _ in line.points]
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
