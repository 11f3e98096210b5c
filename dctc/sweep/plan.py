"""From a sweep file to its runs, all of them checked before the first one starts.

    name: table1                       # of the sweep, and of its parent run in MLflow
    seeds: [0, 1, 2]
    shares: [1/8, 1/4, 1/2]
    set: {schedule.rounds: 600}        # settings of all runs
    rows:
      - {row: U-Net, config: unet.yaml, shares: [1]}
      - {row: no sharpening, config: dctc.yaml, set: {method.sharpen: none}}
      - {row: "U-Net, longer", config: unet.yaml, times: 4}  # than settings and command line say

A config's path is relative to the sweep file. What stands in a row wins over what stands above the rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dctc.config import (
    COMMAND_LINE,
    Config,
    NetworkConfig,
    ScheduleConfig,
    Share,
    load_config,
    nearest,
    parse_override,
    read_mapping,
)
from dctc.engine.build import resolve, run_folder
from dctc.engine.checkpoint import latest
from dctc.engine.model import check_network, check_weights
from shards.errors import InputError
from shards.manifest import Dataset, parse_share

Settings = dict[str, Any]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# What the sweep says of each run, and where it says so.
OWN = {"data.labelled_share": "shares", "run.seed": "seeds", "run.name": "name and row"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, populate_by_name=True)


class Row(_Record):
    """One row of the table."""

    row: Annotated[str, Field(min_length=1)]
    config: str
    shares: Annotated[list[Share], Field(min_length=1)] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    settings: Settings = Field(default={}, alias="set")
    times: Annotated[int, Field(ge=1, lt=2**31)] = 1


class SweepFile(_Record):
    """A whole sweep, as its file says it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    shares: Annotated[list[Share], Field(min_length=1)] | None = None
    settings: Settings = Field(default={}, alias="set")
    rows: Annotated[list[Row], Field(min_length=1)]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        config: the configuration, with everything that the sweep sets.
        dataset: digest of the dataset's manifest.
        file, overrides: what the trainer is started with for it.
        folder: where it will live.
    """

    row: str
    config: Config
    dataset: str
    file: Path
    overrides: tuple[str, ...]
    folder: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.row} {self.config.data.labelled_share} seed {self.config.run.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep and its runs, in the order of the seeds, then the rows, then the shares: the first seed's table is whole
    before the next one begins.

    ``overrides`` are those of the command line. ``chosen`` are the runs that are wanted now, of all ``runs``. ``twins``
    are the rows that the overrides make the same as an earlier row: its name is beside theirs.
    """

    name: str
    file: Path
    runs: tuple[PlannedRun, ...]
    overrides: tuple[str, ...]
    chosen: tuple[PlannedRun, ...]
    twins: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Of the sweep itself, beside those of its runs."""
        return self.runs[0].folder.parent / self.name

    @property
    def experiment(self) -> str:
        """The experiment of all runs."""
        experiment = self.runs[0].config.run.experiment
        assert experiment is not None
        return experiment


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and check every run of it; ``overrides`` (``key=value``) win over all that the file sets.

    Raises:
        InputError: naming the file, the row and the key.
    """
    plan = _read(path)
    by_row: list[tuple[Row, list[PlannedRun]]] = []
    known = _Known()
    _must_leave(overrides, COMMAND_LINE)
    for row in plan.rows:
        try:
            by_row.append((row, list(_runs(plan, row, path, overrides, known))))
        except InputError as error:
            raise InputError(f"{path}: row {row.row!r}: {error.message}") from None
    runs = [run for _, of_row in by_row for run in of_row]
    if len(digests := {run.dataset for run in runs}) > 1:
        raise InputError(
            f"{path}: its rows have {len(digests)} datasets ({', '.join(known.datasets)}); make a sweep for each"
        )
    if len({run.config.run.experiment for run in runs}) > 1:
        raise InputError(f"{path}: its rows have several run.experiment; make a sweep for each")
    seen: set[Path] = set()
    for run in runs:
        if run.folder in seen:
            raise InputError(
                f"{path}: two runs are {run.title}, both in {run.folder}: a share or a seed stands twice, or "
                "rows have names that differ in punctuation alone"
            )
        seen.add(run.folder)
    seeds = list(dict.fromkeys(run.config.run.seed for run in runs))
    runs.sort(key=lambda run: seeds.index(run.config.run.seed))
    return Sweep(plan.name, path, tuple(runs), tuple(overrides), tuple(runs), _twins(by_row, overrides))


def choose(sweep: Sweep, rows: Sequence[str] = (), shares: Sequence[str] = (), seeds: Sequence[int] = ()) -> Sweep:
    """The sweep with the runs of these rows, shares and seeds alone; none of a kind chooses all of it, but for twins.

    Raises:
        InputError: naming what the sweep does not have, or a row whose name would be wrong.
    """
    if wrong := next((row for row in rows if row in sweep.twins), None):
        raise InputError(
            f"--row {wrong}: with the settings of the command line it is the same as {sweep.twins[wrong]!r}: choose "
            "that row, or leave the setting away that takes what sets them apart"
        )
    chosen = [run for run in sweep.runs if run.row not in sweep.twins]
    kinds: list[tuple[str, Sequence[Any], Callable[[PlannedRun], Any]]] = [
        ("--row", rows, lambda run: run.row),
        ("--share", [parse_share(share) for share in shares], lambda run: run.config.data.labelled_share),
        ("--seed", seeds, lambda run: run.config.run.seed),
    ]
    for option, wanted, of in kinds:
        known = list(dict.fromkeys(of(run) for run in sweep.runs))
        for value in wanted:
            if value not in known:
                raise InputError(f"{option} {value}: {sweep.file} has {', '.join(map(str, known))}")
        chosen = [run for run in chosen if not wanted or of(run) in wanted]
    if not chosen:
        raise InputError(f"{sweep.file}: no run is of all of --row, --share and --seed")
    return replace(sweep, chosen=tuple(chosen))


def _read(path: Path) -> SweepFile:
    values = read_mapping(path, "sweep", "name, seeds, shares, set and rows")
    try:
        return SweepFile.model_validate(values)
    except ValidationError as error:
        raise InputError("; ".join(_explain(item, path) for item in error.errors())) from None


def _explain(item: Mapping[str, Any], path: Path) -> str:
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    if item["type"] == "extra_forbidden":
        kind = Row if parts[0] == "rows" and len(parts) > 2 else SweepFile
        known = [field.alias or name for name, field in kind.model_fields.items()]
        return f"{path}: unknown key {key}; {nearest(parts[-1], known)}"
    if item["type"] == "missing":
        return f"{path}: key {key} is missing"
    return f"{path}: key {key} is {item['input']!r}: {item['msg'].removeprefix('Value error, ')}"


class _Known:
    """What several runs share and is looked at once."""

    def __init__(self) -> None:
        self.datasets: dict[str, Dataset] = {}
        self._networks: set[tuple[NetworkConfig, str]] = set()
        self._weights: set[tuple[NetworkConfig, str]] = set()

    def dataset(self, config: Config) -> Dataset:
        """The dataset of a run."""
        place = str(config.data.dataset)
        if place not in self.datasets:
            self.datasets[place] = Dataset.open(config.data.dataset, config.data.cache_settings)
        return self.datasets[place]

    def check_network(self, config: Config, dataset: Dataset) -> None:
        """Raises :class:`InputError` where it cannot be built."""
        key = (config.network, dataset.digest)
        if key not in self._networks:
            check_network(config, dataset)
            self._networks.add(key)

    def check_weights(self, config: Config, dataset: Dataset, folder: Path) -> None:
        """Raises :class:`InputError` where a run in ``folder`` cannot begin with its ``network.weights``.

        One that has begun goes on without the file.
        """
        begun = config.run.resume not in ("auto", "never") or latest(folder / "checkpoints") is not None
        key = (config.network, dataset.digest)
        if begun or (folder / "report.json").exists() or key in self._weights:
            return
        check_weights(config, dataset)
        self._weights.add(key)


def _runs(plan: SweepFile, row: Row, path: Path, overrides: Sequence[str], known: _Known) -> Iterator[PlannedRun]:
    file = path.parent / row.config
    said = [*plan.settings.items(), *row.settings.items()]
    settings = [f"{key}={json.dumps(value, default=str)}" for key, value in said]
    here = ("set", settings)
    _must_leave(settings, "set")
    shares = row.shares or plan.shares or [load_config(file, overrides, [here]).data.labelled_share]
    longer = _longer(load_config(file, overrides, [here]).schedule, row.times) if row.times > 1 else []
    for share in shares:
        for seed in row.seeds or plan.seeds:
            label = re.sub(r"[^\w+.-]+", "-", row.row).strip("-").lower()
            name = f"{plan.name}-{label}-{share}-s{seed}"
            own = [f"data.labelled_share={share}", f"run.seed={seed}", f"run.name={json.dumps(name)}"]
            own.append(f"tracking.tags={json.dumps({'sweep': plan.name, 'row': row.row})}")
            own += longer
            config = resolve(load_config(file, [*overrides, *own], [here]))
            dataset = known.dataset(config)
            _must_have(dataset, config)
            known.check_network(config, dataset)
            experiment = config.run.experiment or f"{dataset.manifest.name}-{dataset.manifest.protocol}"
            own.append(f"run.experiment={json.dumps(experiment)}")
            config = resolve(load_config(file, [*overrides, *own], [here]))
            folder = run_folder(config, dataset)
            known.check_weights(config, dataset, folder)
            yield PlannedRun(row.row, config, dataset.digest, file, (*settings, *overrides, *own), folder)


def _twins(by_row: Sequence[tuple[Row, Sequence[PlannedRun]]], overrides: Sequence[str]) -> dict[str, str]:
    """Rows that an override makes the same as an earlier one: name -> the name of that one.

    Rows that are the same without it are meant so: a default beside the values that it is compared with.
    """
    twins: dict[str, str] = {}
    first: dict[str, Row] = {}
    for row, runs in by_row:
        keys = [_all_but_names(run) for run in runs]
        earlier = {first[key].row: first[key] for key in keys if key in first}
        if len(earlier) == 1 and all(key in first for key in keys):
            name, other = next(iter(earlier.items()))
            if any(_touches(text, key) for text in overrides for key in {*row.settings, *other.settings}):
                twins[row.row] = name
        first |= {key: row for key in keys if key not in first}
    return twins


def _all_but_names(run: PlannedRun) -> str:
    kept = {k: v for k, v in run.config.flat().items() if k != "run.name" and not k.startswith("tracking.tags")}
    return json.dumps(kept, sort_keys=True, default=str)


def _touches(override: str, key: str) -> bool:
    """Whether ``key=value`` sets ``key``, or a part of it, or what it is a part of."""
    said = override.partition("=")[0].strip()
    return f"{key}.".startswith(f"{said}.") or f"{said}.".startswith(f"{key}.")


def _longer(schedule: ScheduleConfig, times: int) -> list[str]:
    """Settings of a run that is so many times as long; the warm-up keeps its share of it."""
    if schedule.rounds is not None:
        return [f"schedule.rounds={times * schedule.rounds}"]
    settings = [f"schedule.epochs={times * schedule.epochs}"]
    if schedule.warmup_epochs is not None:
        settings.append(f"schedule.warmup_epochs={times * schedule.warmup_epochs}")
    return settings


def _must_leave(overrides: Iterable[str], source: str) -> None:
    """Raises :class:`InputError` for a setting that the sweep itself makes, or what is said there would be lost."""
    for text in overrides:
        nested = parse_override(text)
        for key, place in OWN.items():
            section, _, last = key.partition(".")
            if isinstance(nested.get(section), Mapping) and last in nested[section]:
                raise InputError(f"{source}: key {key}: a sweep sets it for each run, from its {place}: write it there")


def _must_have(dataset: Dataset, config: Config) -> None:
    """A sweep takes the shares that the dataset lists, whose missing classes were looked at when it was packed."""
    listed = dataset.manifest.labelled.shares
    if config.data.labelled_share not in {parse_share(text) for text in listed}:
        raise InputError(
            f"share {config.data.labelled_share} is not one of {dataset.location} ({', '.join(listed)}); put it into "
            "labelled.shares of the recipe and pack again"
        )
