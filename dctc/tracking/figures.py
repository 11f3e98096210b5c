"""Pictures of a run: panels of tiles with what each net says of them, and the confusion matrix."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dctc.tracking.journal import write_atomically
from shards.manifest import IGNORE, ClassInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pixels = NDArray[np.uint8]
PAPER, INK = (255, 255, 255), (45, 45, 50)
GAP, MARGIN = 6, 14
HATCH = np.array([[236, 236, 236], [208, 208, 208]], np.uint8)  # where there is no data or no label


def panel(
    columns: Mapping[str, NDArray[Any]],
    classes: Sequence[ClassInfo],
    *,
    valid: NDArray[np.bool_] | None = None,
    rows: Sequence[str] = (),
    limits: Sequence[tuple[float, float]] | None = None,
    ignore: int = IGNORE,
    cell: int = 256,
) -> Image.Image:
    """A table of N tiles: one row a tile, one column an entry of ``columns`` under its title.

    Args:
        columns: title -> [N,C,H,W] of any real dtype: an image, stretched (:func:`stretch`); [N,H,W] of integers: a
            class map in the classes' colours; [N,H,W] of floats: predictive entropy in nats, from 0 to ln K.
        classes: names and colours in id order, for the maps and the legend.
        valid: bool [N,H,W]; pixels outside are hatched in every column, like those of a map that are ``ignore``.
        rows: N captions, or none.
        limits: per band the values shown as black and white; found from the images when None.
        cell: width of a column in pixels; the height follows the tiles' shape.

    Raises:
        ValueError: when a column has another shape or a map an impossible class id.
    """
    if not columns:
        raise ValueError("a panel needs at least one column")
    pictures = {title: _pictures(title, values, classes, valid, limits, ignore) for title, values in columns.items()}
    shapes = {picture.shape for picture in pictures.values()}
    if len(shapes) > 1:
        raise ValueError(f"columns differ in shape: { {title: p.shape[:3] for title, p in pictures.items()} }")
    count, height, width, _ = shapes.pop()
    tall = round(cell * height / width)
    heat = any(_is_heat(values) for values in columns.values())
    title_font, font = ImageFont.load_default(17), ImageFont.load_default(14)
    left = MARGIN + (26 if rows else 0)
    top = MARGIN + 28
    page_width = left + len(columns) * (cell + GAP) - GAP + MARGIN
    entries = _legend_rows(classes, font, page_width - left - MARGIN, heat)
    bottom = top + count * (tall + GAP) - GAP
    page = Image.new("RGB", (page_width, bottom + 16 + 26 * len(entries) + MARGIN - 4), PAPER)
    draw = ImageDraw.Draw(page)
    for x, (title, tiles) in enumerate(pictures.items()):
        at = left + x * (cell + GAP)
        draw.text((at + cell / 2, MARGIN + 10), title, INK, title_font, anchor="mm")
        for y in range(count):
            smooth = columns[title].ndim == 4 and cell < width
            resample = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
            page.paste(Image.fromarray(tiles[y]).resize((cell, tall), resample), (at, top + y * (tall + GAP)))
    for y, caption in enumerate(rows):
        page.paste(_sideways(caption, font, tall), (MARGIN, top + y * (tall + GAP)))
    _draw_legend(page, entries, left, bottom + 16, font, len(classes))
    return page


def stretch(
    images: NDArray[Any],
    valid: NDArray[np.bool_] | None = None,
    limits: Sequence[tuple[float, float]] | None = None,
    percentiles: tuple[float, float] = (2.0, 98.0),
) -> Pixels:
    """Images [N,C,H,W] of any real dtype and range as uint8 [N,H,W,3]: the first three bands, or the first as grey.

    Each band is scaled between its ``limits``, else between its percentiles over the valid, finite pixels of all N
    tiles together, so that a dark tile stays darker than a bright one. A constant band is mid grey.
    """
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    bands = []
    for index in range(shown.shape[1]):
        band = shown[:, index].astype(np.float64)
        usable = np.isfinite(band) if valid is None else np.isfinite(band) & valid
        if limits is not None:
            low, high = limits[index]
        elif usable.any():
            low, high = np.percentile(band[usable], percentiles)
        else:
            low, high = 0.0, 0.0
        scaled = (band - low) / (high - low) if high > low else np.full_like(band, 0.5)
        bands.append((np.nan_to_num(scaled, nan=0.0).clip(0, 1) * 255).round().astype(np.uint8))
    return np.stack(bands * (3 if len(bands) == 1 else 1), axis=-1)


def confusion_picture(matrix: NDArray[np.int64], names: Sequence[str], title: str = "") -> Image.Image:
    """A confusion matrix (pixels [K,K], rows truth) as shares of each row, with the counts below; K is any number.

    A class without a pixel in the truth has a hatched row: it has no shares.
    """
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to whoever calls us
    from matplotlib.patches import Rectangle

    size = len(names)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = 2.3 + max(0.95 * min(size, 8), 0.62 * size)
    figure = Figure(figsize=(side + 0.9, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in np.flatnonzero(totals == 0):
        axes.add_patch(Rectangle((-0.5, row - 0.5), size, 1, facecolor="0.93", edgecolor="0.7", hatch="///", lw=0))
    if size <= 24:
        _write_cells(axes, matrix, shares)
    axes.set_xticks(range(size), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(
        range(size), [f"{name}\n{_short(total)} px" for name, total in zip(names, totals[:, 0], strict=True)]
    )
    axes.set_xticks(np.arange(size - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(size - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="truth")
    axes.set_title(title, fontsize=11, pad=10)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, label="share of the true class", format="{x:.0%}")
    bar.outline.set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    with Image.open(data) as picture:
        return picture.convert("RGB")


def reliability_picture(curves: Mapping[str, Sequence[Sequence[Any]]], title: str = "") -> Image.Image:
    """Accuracy over confidence of each curve, and the share of the pixels in each bin below.

    Args:
        curves: caption -> rows of a calibration table: from, to, pixels, mean confidence, accuracy; the last two are
            not read where there is no pixel.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.4), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], "--", color="0.5", lw=1)
    for (caption, rows), color in zip(curves.items(), ("#08519c", "#e6550d", "0.3"), strict=False):
        edges = [float(rows[0][0]), *(float(row[1]) for row in rows)]
        pixels = np.array([row[2] for row in rows], np.float64)
        full = [row for row in rows if row[2]]
        points = [[float(row[column]) for row in full] for column in (3, 4)]
        upper.plot(*points, "o-", color=color, ms=4, label=caption)
        lower.stairs(pixels / max(1, pixels.sum()), edges, color=color, fill=True, alpha=0.35)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    upper.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=2)
    lower.set(xlabel="confidence", ylabel="share of pixels")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    with Image.open(data) as picture:
        return picture.convert("RGB")


def _write_cells(axes: Axes, matrix: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    """Share and, where there is room, count in every cell that is not empty."""
    roomy = len(matrix) <= 10
    for row, column in np.argwhere(matrix > 0):
        text = f"{100 * shares[row, column]:.1f} %" + (f"\n{_short(matrix[row, column])}" if roomy else "")
        color = "white" if shares[row, column] > 0.5 else "0.15"
        weight = "bold" if row == column else "normal"
        axes.text(column, row, text, ha="center", va="center", color=color, size=9 if roomy else 7, weight=weight)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG, whole or not at all, in a folder that is made when missing; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_atomically(path, data.getvalue())
    return path


def _is_heat(values: NDArray[Any]) -> bool:
    return values.ndim == 3 and not np.issubdtype(values.dtype, np.integer)


def _pictures(
    title: str,
    values: NDArray[Any],
    classes: Sequence[ClassInfo],
    valid: NDArray[np.bool_] | None,
    limits: Sequence[tuple[float, float]] | None,
    ignore: int,
) -> Pixels:
    """One column as uint8 [N,H,W,3]."""
    if values.ndim == 4:
        pictures, blank = stretch(values, valid, limits), ~np.isfinite(values).all(axis=1)
    elif values.ndim != 3:
        raise ValueError(f"column {title!r} must be [N,C,H,W] or [N,H,W], not {values.shape}")
    elif _is_heat(values):
        blank = ~np.isfinite(values)
        pictures = _heat_colors()[
            (np.nan_to_num(values) / _most_nats(len(classes)) * 255).clip(0, 255).astype(np.uint8)
        ]
    else:
        blank = values == ignore
        if ((values < 0) | (values >= len(classes)))[~blank].any():
            raise ValueError(f"column {title!r} has class ids outside 0..{len(classes) - 1}")
        colors = np.array([info.color for info in classes], np.uint8)
        pictures = colors[np.where(blank, 0, values).astype(np.int64)]
    if valid is not None:
        if valid.shape != blank.shape:
            raise ValueError(f"valid is {valid.shape}, column {title!r} {blank.shape}")
        blank = blank | ~valid
    pictures[blank] = np.broadcast_to(_hatch(*blank.shape[1:]), pictures.shape)[blank]
    return pictures


def _hatch(height: int, width: int) -> Pixels:
    """Diagonal stripes [H,W,3], wide enough to survive shrinking."""
    stripe = max(4, min(height, width) // 32)
    rows, columns = np.ogrid[:height, :width]
    pixels: Pixels = HATCH[(rows + columns) // stripe % 2]
    return pixels


def _heat_colors() -> Pixels:
    from matplotlib import colormaps

    return np.asarray(colormaps["magma"](np.arange(256), bytes=True), np.uint8)[:, :3]


def _most_nats(classes: int) -> float:
    """The entropy of knowing nothing; any positive number will do for a single class."""
    return math.log(max(classes, 2))


def _sideways(text: str, font: Any, length: int) -> Image.Image:
    """``text`` running upwards, centred on ``length`` pixels and cut to them."""
    image = Image.new("RGB", (length, 20), PAPER)
    while len(text) > 1 and font.getlength(text) > length:
        text = text[:-2] + "…"
    ImageDraw.Draw(image).text((length / 2, 10), text, INK, font, anchor="mm")
    return image.transpose(Image.Transpose.ROTATE_90)


def _legend_rows(classes: Sequence[ClassInfo], font: Any, width: int, heat: bool) -> list[list[tuple[str, Any]]]:
    """Legend entries (name, colour or kind) broken into lines of at most ``width`` pixels."""
    entries: list[tuple[str, Any]] = [(info.name, info.color) for info in classes]
    entries += [("no label or data", "hatch")] + ([("entropy", "heat")] if heat else [])
    lines: list[list[tuple[str, Any]]] = [[]]
    used = 0.0
    for entry in entries:
        need = _entry_width(entry, font, len(classes))
        if lines[-1] and used + need > width:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += need
    return lines


def _entry_width(entry: tuple[str, Any], font: Any, classes: int) -> float:
    if entry[1] == "heat":
        return float(172 + font.getlength("entropy  0") + font.getlength(f"{_most_nats(classes):.2f} nats") + 30)
    return float(18 + 6 + font.getlength(entry[0]) + 20)


def _draw_legend(
    page: Image.Image, lines: list[list[tuple[str, Any]]], left: int, top: int, font: Any, classes: int
) -> None:
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        x, y = float(left), top + 26 * number
        for entry in line:
            name, kind = entry
            if kind == "heat":
                label = f"{name}  0"
                draw.text((x, y + 8), label, INK, font, anchor="lm")
                start = round(x + font.getlength(label)) + 6
                ramp = np.broadcast_to(_heat_colors()[np.linspace(0, 255, 160).astype(int)], (16, 160, 3))
                page.paste(Image.fromarray(ramp.copy()), (start, y))
                draw.text((start + 166, y + 8), f"{_most_nats(classes):.2f} nats", INK, font, anchor="lm")
            else:
                swatch = _hatch(16, 16) if kind == "hatch" else np.full((16, 16, 3), kind, np.uint8)
                page.paste(Image.fromarray(swatch), (round(x), y))
                draw.rectangle((round(x), y, round(x) + 15, y + 15), outline=(150, 150, 150))
                draw.text((x + 24, y + 8), name, INK, font, anchor="lm")
            x += _entry_width(entry, font, classes)


def _short(count: float) -> str:
    """A count in three digits: 12, 4.56 k, 78.9 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(int(count))
