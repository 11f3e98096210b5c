"""A comparison as one HTML file that needs nothing else: it opens offline, on a phone too; its tables can be sorted."""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path

from dctc.tracking.charts import Series, figure6, is_curve, svg
from dctc.tracking.comparison import Comparison, order
from dctc.tracking.journal import write_atomically

# A browser loads nothing from elsewhere, whatever the page says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 74rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.table, .panel { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.panel { width: fit-content; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: Canvas; } tbody th { font-weight: 400; }
tr:last-child > * { border-bottom: 0; } thead > tr > * { border-bottom: 1px solid var(--line); }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; }
thead button, summary { cursor: pointer; }
thead button::after { content: " \\2195"; opacity: .4; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
tr.other > * { color: color-mix(in srgb, CanvasText 62%, Canvas); }
td.best { font-weight: 700; } small { opacity: .75; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.table + .charts, .panel + details, ul + .charts { margin-top: 1rem; }
figure { margin: 0; max-width: 40rem; } figcaption { font-weight: 600; font-size: .9rem; }
svg { width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 14px; } @media (max-width: 36rem) { svg text { font-size: 17px; } }
.grid { stroke: currentColor; opacity: .15; }
.key { list-style: none; padding: 0; margin: .2rem 0; display: flex; flex-wrap: wrap; gap: .2rem .9rem; }
.key { font-size: .85rem; }
.key span { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 50%; }
.key .dashed { width: 1.4em; height: 0; border-top: 2px dashed; border-radius: 0; vertical-align: .3em; }
.key .open { background: none !important; border: 1.5px solid; box-sizing: border-box; }
.panel img { display: block; min-width: 34rem; max-width: 100%; } dt { font-weight: 600; } dd { margin: 0 0 .4rem; }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.sort;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b), both = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (both ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
    });
    body.append(...rows);
  }));
}
"""


@dataclass(frozen=True)
class History:
    """Curves of one run over its rounds, under a caption."""

    caption: str
    lines: Sequence[Series]


@dataclass(frozen=True)
class Extras:
    """What stands below a comparison's table.

    Attributes:
        histories: curves.
        panels: caption and PNG bytes.
        notes: what is missing among them.
    """

    histories: Sequence[History] = ()
    panels: Sequence[tuple[str, bytes]] = ()
    notes: Sequence[str] = ()


def page(comparisons: Sequence[Comparison], extras: Sequence[Extras], command: str) -> str:
    """The whole page; ``extras`` go with the comparisons. Every name in it is escaped."""
    sections = [_section(table, extra) for table, extra in zip(comparisons, extras, strict=True)]
    names = ", ".join(dict.fromkeys(table.experiment for table in comparisons))
    facts = {
        "command": command,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": f"dctc {version('dctc')}, MLflow {version('mlflow')}, Python {platform.python_version()}",
    }
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(names)}</title><style>{STYLE}</style></head><body><h1>{escape(names)}</h1>"
        f"<dl>{listed}</dl>{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    )


def write_page(comparisons: Sequence[Comparison], extras: Sequence[Extras], command: str, path: Path) -> None:
    """The page as a file. Atomic."""
    write_atomically(path, page(comparisons, extras, command).encode())


def _section(table: Comparison, extra: Extras) -> str:
    parts = [f"<section><h2>{escape(table.title)}</h2><p><small>dataset {escape(table.digest[:12])}</small></p>"]
    parts.append(_table(table))
    parts.append(_list(table.notes))
    lines = figure6(table) if table.axes[1] == "share" and table.costs else []
    if is_curve(lines):
        parts.append(f'<div class="charts">{svg(lines, "labelled share, %", f"test {table.measure}, %")}</div>')
    for caption, data in extra.panels:
        encoded = base64.b64encode(data).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{encoded}">'
        parts.append(f'<h3>{escape(caption)}</h3><div class="panel" tabindex="0">{image}</div>')
    parts.append(_list(extra.notes))
    if extra.histories:
        charts = "".join(svg(history.lines, "round", history.caption) for history in extra.histories)
        parts.append(f'<details><summary>Curves over the rounds</summary><div class="charts">{charts}</div></details>')
    return "".join(parts) + "</section>"


def _list(notes: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _table(table: Comparison) -> str:
    several = len({net for _, net in table.rows}) > 1
    costs = any(str(cost) for cost in table.costs.values())
    names = [table.axes[0], *(["net"] if several else []), *table.columns]
    names += ["seconds", "GFLOP a round", "GiB"] if costs else []
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in names)
    body = "".join(_row(table, row, net, several, costs) for row, net in table.rows)
    return f'<div class="table" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(table: Comparison, row: str, net: str, several: bool, costs: bool) -> str:
    headline = table.is_headline(row, net)
    place = order(row)[0]
    key = repr(place) if math.isfinite(place) else row
    cells = [f'<th scope="row" data-sort="{escape(key)}">{escape(row)}</th>']
    cells += [_cell(net, net)] if several else []
    for column in table.columns:
        cell = table.cells.get((row, net, column))
        if cell is None:
            cells.append(_cell("–", ""))
            continue
        best = headline and cell.mean == table.best(column)
        own, _, beside = str(cell).partition(", ")
        cells.append(_cell(own, repr(cell.mean), beside, "best" if best else ""))
    if costs:
        cost = table.costs[row]
        for value, text in ((cost.seconds, "{:.0f}"), (cost.gflop, "{:.1f}"), (cost.memory_gib, "{:.2f}")):
            cells.append(_cell("–", "") if value is None else _cell(text.format(value), repr(value)))
    return f"<tr{'' if headline else ' class=other'}>{''.join(cells)}</tr>"


def _cell(text: str, key: str, small: str = "", kind: str = "") -> str:
    beside = f"<br><small>{escape(small)}</small>" if small else ""
    return f'<td data-sort="{escape(key)}"{f" class={kind}" if kind else ""}>{escape(text)}{beside}</td>'
