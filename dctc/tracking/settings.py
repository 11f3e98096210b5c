"""The settings that runs differ in: runs of one cell that differ in one that matters are never averaged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dctc.tracking.found import FoundRun

# Parameters in which runs may differ and still measure the same thing.
NEUTRAL = (
    "run.",
    "tracking.",
    "parallel.strategy",
    "parallel.activation_checkpointing",
    "parallel.compile",
    "parallel.offload",
    "parallel.timeout",
    "evaluation.",
    "data.dataset",  # its digest counts
    "data.workers",
    "data.prefetch",
    "data.cache",
    "network.weights",  # its digest counts
)
OWN = ("method.", "network.name", "data.labelled_share")  # what rows and columns are about
MOST = 3  # rows that a note names for each value

Key = tuple[str, str]  # row, column
Groups = Mapping[Key, Sequence[FoundRun]]


@dataclass(frozen=True)
class Separated:
    """Runs by row and column, each group of equal settings.

    Attributes:
        keys: row -> the settings that divided it, and that its name tells.
        notes: about the rows that were divided.
    """

    groups: Groups
    keys: Mapping[str, frozenset[str]]
    notes: tuple[str, ...]


def separate(groups: Groups) -> Separated:
    """Divide the rows in which runs of one cell differ, by the values of the settings that they differ in."""
    mixed: dict[str, frozenset[str]] = defaultdict(frozenset)
    for (row, _), group in groups.items():
        mixed[row] |= _differences(group)
    divided: dict[Key, list[FoundRun]] = defaultdict(list)
    keys: dict[str, frozenset[str]] = {}
    for (row, column), group in groups.items():
        for run in group:
            values = [f"{key}={run.params.get(key, 'unset')}" for key in sorted(mixed[row])]
            name = f"{row} [{', '.join(values)}]" if values else row
            divided[name, column].append(run)
            keys[name] = mixed[row]
    notes = tuple(
        f"{row}: its runs differ in {', '.join(sorted(differing))}, so it has several rows"
        for row, differing in mixed.items() if differing
    )  # fmt: skip
    return Separated(dict(divided), keys, notes)


def unequal(separated: Separated) -> list[str]:
    """A note for each setting that rows, or columns, do not have in common and that no row's name tells.

    What methods and networks are, and the labelled share, may differ: that is what is compared.
    """
    runs = [run for group in separated.groups.values() for run in group]
    told = frozenset().union(*separated.keys.values())
    notes = []
    for key in sorted(_differences(runs) - told):
        if key.startswith(OWN):
            continue
        rows: dict[str, dict[str, None]] = defaultdict(dict)
        for (row, _), group in separated.groups.items():
            for run in group:
                if key in run.params:
                    rows[run.params[key]][row] = None
        texts = [f"{value} ({_some(list(names))})" for value, names in sorted(rows.items())]
        if len(texts) > 1:
            notes.append(f"not all runs have the same {key}: {'; '.join(texts)}")
    return notes


def _differences(runs: Iterable[FoundRun]) -> frozenset[str]:
    """Names of the parameters, other than neutral ones, that are not the same in all runs."""
    params = [run.params for run in runs]
    keys = {key for values in params for key in values if not key.startswith(NEUTRAL)}
    return frozenset(key for key in keys if len({values.get(key) for values in params}) > 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST]) + (", ..." if len(names) > MOST else "")
