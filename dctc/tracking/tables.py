"""A comparison as text: for a terminal, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dctc.tracking.comparison import Comparison, Cost
from dctc.tracking.journal import write_atomically

COST = "a run"  # heading of what a run takes
COLUMNS = (
    *("experiment", "dataset_digest", "subject", "row", "net", "column", "metric", "mean", "std", "seeds", "paper"),
    *("headline", "train_seconds", "round_gflop", "peak_memory_gib"),
)


def terminal_table(comparison: Comparison) -> Group:
    """Percent, mean ± standard deviation (seeds), the best headline of each column in bold, other nets dim."""
    title = Text(f"{comparison.title}\ndataset {comparison.digest[:12]}", "italic")
    table = Table()
    several = len({net for _, net in comparison.rows}) > 1
    costs = any(str(cost) for cost in comparison.costs.values())
    for column in (
        comparison.axes[0],
        *(["net"] if several else []),
        *comparison.columns,
        *([COST] if costs else []),
    ):
        table.add_column(
            Text(column),
            justify="right" if column in comparison.columns else "left",
            no_wrap=column == COST,
            overflow="fold",
        )
    previous = None
    for row, net in comparison.rows:
        if previous not in (None, row) and several:
            table.add_section()
        texts = [_cell(comparison, row, net, column) for column in comparison.columns]
        head = Text("" if row == previous else row)
        tail = [Text(str(comparison.costs[row]).replace(", ", "\n") if row != previous else "")] if costs else []
        table.add_row(head, *([Text(net)] if several else []), *texts, *tail)
        previous = row
    return Group(title, table, *map(Text, comparison.notes))  # Text: brackets in names are no markup


def _cell(comparison: Comparison, row: str, net: str, column: str) -> Text:
    cell = comparison.cells.get((row, net, column))
    if cell is None:
        return Text("–", style="dim")
    lines = str(cell).replace(", ", "\n")  # the paper's figure below one's own
    if not comparison.is_headline(row, net):
        return Text(lines, style="dim")
    return Text(lines, style="bold" if cell.mean == comparison.best(column) else "")


def markdown(comparisons: Iterable[Comparison]) -> str:
    """All tables, a heading each."""
    parts = []
    for comparison in comparisons:
        several = len({net for _, net in comparison.rows}) > 1
        costs = any(str(cost) for cost in comparison.costs.values())
        heads = [comparison.axes[0], *(["net"] if several else []), *comparison.columns, *([COST] if costs else [])]
        lines = [f"## {_escaped(comparison.title)}", "", f"Dataset {comparison.digest[:12]}.", ""]
        lines += ["| " + " | ".join(map(_escaped, heads)) + " |", "|" + "---|" * len(heads)]
        for row, net in comparison.rows:
            texts = [_markdown_cell(comparison, row, net, column) for column in comparison.columns]
            if costs:
                texts.append(str(comparison.costs[row]) if comparison.is_headline(row, net) else "")
            lines.append("| " + " | ".join([_escaped(row), *([_escaped(net)] if several else []), *texts]) + " |")
        lines += ["", *(f"- {_escaped(note)}" for note in comparison.notes)]
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(parts)


def write_markdown(comparisons: Iterable[Comparison], path: Path) -> None:
    """The same as a file. Atomic."""
    write_atomically(path, markdown(comparisons).encode())


def _markdown_cell(comparison: Comparison, row: str, net: str, column: str) -> str:
    cell = comparison.cells.get((row, net, column))
    if cell is None:
        return "–"
    best = comparison.is_headline(row, net) and cell.mean == comparison.best(column)
    return f"**{cell}**" if best else str(cell)


def _escaped(text: str) -> str:
    for character in "\\|<>*_[]`":
        text = text.replace(character, "\\" + character)
    return text


def write_csv(comparisons: Iterable[Comparison], path: Path) -> None:
    """All cells, one a line, unrounded fractions of 1, and what a run of the row takes. Atomic."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for table in comparisons:
        for (row, net, column), cell in sorted(table.cells.items()):
            key = [table.experiment, table.digest, table.subject.rstrip(": "), row, net, column, table.metric]
            printed = None if cell.printed is None else cell.printed / 100
            cost = table.costs.get(row, Cost(None, None, None))
            took = [cost.seconds, cost.gflop, cost.memory_gib]
            headline = int(table.is_headline(row, net))
            writer.writerow([*key, cell.mean, cell.std, len(cell.scores), printed, headline, *took])  # None: empty
    write_atomically(path, text.getvalue().encode())
