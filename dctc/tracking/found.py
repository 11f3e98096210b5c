"""The runs of an experiment, read from MLflow alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from dctc.tracking.remote import flatten, shown
from dctc.tracking.store import client_of, database_of
from shards.errors import InputError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

CHANGED = "changed/"  # tags of a continued run: MLflow keeps params as they were


@dataclass(frozen=True)
class FoundRun:
    """One run.

    Attributes:
        status: FINISHED, FAILED, KILLED, RUNNING, ...
        started: milliseconds since 1970.
        params: with what a continued run changed.
        metrics: the last value of each.
        classes: of its dataset, in their order; () where the run has no dataset's description.
    """

    id: str
    name: str
    status: str
    started: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    classes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The net whose score is the method's."""
        return self.tags.get("headline", "s1")

    @property
    def digest(self) -> str:
        """Of the dataset: one digest, one set of tiles, splits and labels."""
        return self.tags.get("dataset_digest", "unknown")

    def score(self, net: str, metric: str) -> float | None:
        """A test score, as a fraction of 1; None without one, and for one that is not finite."""
        value = self.metrics.get(f"test/{net}/{metric}")
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Found:
    """The runs of one experiment; parents of sweeps are left out.

    Attributes:
        finished: those that ended well, oldest first.
        others: the rest.
    """

    uri: str
    experiment: str
    finished: tuple[FoundRun, ...]
    others: tuple[FoundRun, ...]


def find_runs(uri: str, experiment: str | None = None, sweep: str | None = None) -> Found:
    """Read the runs of an experiment, or those of one sweep in it.

    ``experiment`` may be None when the server has one only.

    Raises:
        InputError: no such database, server, experiment or sweep.
    """
    client = open_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        known = {found.name: found.experiment_id for found in client.search_experiments() if found.name != "Default"}
        wanted = next(iter(known)) if experiment is None and len(known) == 1 else experiment
        if wanted not in known:
            problem = "name an experiment" if wanted is None else f"no experiment {wanted!r}"
            raise InputError(f"{problem}: {shown(uri)} has {', '.join(sorted(known)) or 'none'}")
        runs: list[FoundRun] = []
        token: str | None = None
        while token != "":
            page = client.search_runs([known[wanted]], page_token=token)
            runs += [_found(run) for run in page if run.data.tags.get("kind") != "sweep"]
            token = page.token or ""
    except MlflowException as error:
        raise InputError(f"{shown(uri)}: MLflow cannot be read ({str(error)[:200]})") from error
    if sweep is not None:
        sweeps = sorted({run.tags["sweep"] for run in runs if "sweep" in run.tags})
        runs = [run for run in runs if run.tags.get("sweep") == sweep]
        if not runs:
            raise InputError(f"experiment {wanted!r} has no sweep {sweep!r}; it has {', '.join(sweeps) or 'none'}")
    runs = sorted(_completed(runs), key=lambda run: run.started)
    finished = tuple(run for run in runs if run.status == "FINISHED")
    return Found(uri, wanted, finished, tuple(run for run in runs if run.status != "FINISHED"))


def _completed(runs: Sequence[FoundRun]) -> list[FoundRun]:
    """The runs, with the options of their methods that are newer than they are at their defaults, as it was then."""
    options: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        options[run.params.get("method.name", "")].update(key for key in run.params if key.startswith("method."))
    lacking = {
        name for run in runs if (name := run.params.get("method.name", "")) and not options[name] <= run.params.keys()
    }
    defaults = {name: _defaults(name) for name in lacking}
    return [replace(run, params={**defaults.get(run.params.get("method.name", ""), {}), **run.params}) for run in runs]


def _defaults(method: str) -> dict[str, str]:
    """Of its options, as parameters; none where this version has no such method."""
    from dctc.methods import OptionError, parse_options  # torch with it, for runs of several versions alone

    try:
        return flatten({"method": asdict(parse_options(method, {}))})
    except OptionError:
        return {}


def open_client(uri: str) -> MlflowClient:
    """A client of a server or database that is there; raises :class:`InputError`."""
    database = database_of(uri)
    if database is not None and not database.exists():
        raise InputError(f"{uri}: no such database; train first, or set tracking.uri or MLFLOW_TRACKING_URI")
    return client_of(uri)


def _found(run: Run) -> FoundRun:
    info, data = run.info, run.data
    changed = {
        key.removeprefix(CHANGED): value for key, value in data.tags.items() if key.startswith(CHANGED)
    }  # fmt: skip
    return FoundRun(
        info.run_id, info.run_name or info.run_id, info.status, int(info.start_time or 0), dict(data.tags),
        dict(data.params) | changed, dict(data.metrics), _classes(run),
    )  # fmt: skip


def _classes(run: Run) -> tuple[str, ...]:
    """As :func:`dctc.tracking.run.describe_dataset` wrote them; another program's dataset may say anything."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    try:
        return tuple(str(name) for name in json.loads(inputs[0].dataset.profile or "")["classes"])
    except (IndexError, KeyError, TypeError, ValueError):
        return ()
