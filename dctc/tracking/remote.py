"""One run on an MLflow server: found or made, and what is sent to it. Every call here may fail and may be repeated.

Nothing arrives twice: a run is made under a token chosen here, so that a lost answer does not make a second one; and
metrics that the server has already are known by their last step and value.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dctc.tracking.journal import Entry, write_atomically
from dctc.tracking.store import client_of, database_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger("dctc.tracking")

IDENTITY = "mlflow.json"
TOKEN_TAG = "run_token"
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH, PER_BATCH = 6000, 8000, 36, 100  # MLflow's limits
METRICS_PER_BATCH = 1000


class Refused(Exception):
    """The server answered, and will never take this event."""


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset as an MLflow input: ``digest`` is the sha256 of its manifest, ``profile`` any plain JSON values."""

    name: str
    digest: str
    source: str
    profile: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSettings:
    """All that identifies a run and says where it is kept.

    Attributes:
        folder: the run's folder, ``runs/EXPERIMENT/RUN``.
        experiment, name: MLflow's experiment (dataset and protocol) and the short run name.
        uri: of the tracking server, from :func:`dctc.tracking.run.resolve_uri`.
        tags: method, labelled_share, seed, dataset_digest, git_commit, strategy, ...
        params: the configuration, nested or flat.
        run_id: of the MLflow run to continue, when a checkpoint knows it.
        resumed_step: the step from which the run goes on; None for a run that starts afresh.
        started: Unix seconds.
        register: the registered model of which the run's model becomes a version; None for none.
    """

    folder: Path
    experiment: str
    name: str
    uri: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    dataset: DatasetRecord | None = None
    run_id: str | None = None
    resumed_step: int | None = None
    started: float = 0.0
    register: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for :meth:`from_json`, without the folder, which may be moved."""
        values = dataclasses.asdict(self)
        del values["folder"]
        return values | {"params": flatten(self.params)}

    @classmethod
    def from_json(cls, folder: Path, values: Mapping[str, Any]) -> RunSettings:
        """The settings written by :meth:`as_json`."""
        dataset = DatasetRecord(**values["dataset"]) if values["dataset"] else None
        return cls(folder=folder, **{**values, "dataset": dataset})


@dataclass(frozen=True)
class Event:
    """Something other than a metric: a picture, a file or the model (absolute, in ``file``), or the final status."""

    kind: Literal["picture", "artifact", "model", "status"]
    time: float
    file: str = ""
    key: str = ""
    step: int = 0
    status: str = ""


class RemoteRun:
    """The run of ``settings`` on its server. ``run_id`` is None until :meth:`connect` has found or made it.

    With ``reopen`` it is the run that ``mlflow.json`` in the run's folder names, when that is on the same server.
    """

    def __init__(self, settings: RunSettings, reopen: bool) -> None:
        self._settings = settings
        self._client: MlflowClient | None = None
        self._last: dict[str, tuple[int, float]] = {}
        self._identity = settings.folder / IDENTITY
        known = json.loads(self._identity.read_text()) if self._identity.exists() else {}
        same = reopen and known.get("tracking_uri") == settings.uri
        self.run_id: str | None = settings.run_id or (known.get("run_id") if same else None)
        self._token: str = known["token"] if same else uuid.uuid4().hex
        self._save_identity()

    @property
    def connected(self) -> bool:
        """Whether :meth:`connect` has succeeded."""
        return self._client is not None

    def connect(self) -> None:
        """Find the run or make it, log what it lacks (tags, params, dataset) and mark it running."""
        client = client_of(self._settings.uri)
        experiment = experiment_of(client, self._settings.experiment)
        run = self._find(client, experiment) or self._create(client, experiment)
        self.run_id = run.info.run_id
        self._save_identity()
        self._last = {metric.key: (metric.step, metric.value) for metric in run.data.to_proto().metrics}
        _log_settings(client, run, self._settings)
        client.update_run(self.run_id, status="RUNNING")
        self._client = client

    def send_metrics(self, entries: Iterable[Entry]) -> None:
        """Send what the server does not have yet, in the order of the entries."""
        from mlflow.entities import Metric

        client, run_id = self._open()
        metrics = []
        for entry in entries:
            for name, value in entry.values.items():
                key = metric_key(name)
                if self._is_new(key, entry.step, value):
                    metrics.append(Metric(key, value, round(entry.time * 1000), entry.step))
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            batch = metrics[start : start + METRICS_PER_BATCH]
            _taken(client.log_batch, run_id, metrics=batch, synchronous=True)
            self._last |= {metric.key: (metric.step, metric.value) for metric in batch}

    def send(self, event: Event) -> None:
        """Send one event.

        Raises:
            Refused: when it can never be sent, its file being gone, say.
        """
        client, run_id = self._open()
        if event.kind == "status":
            client.set_terminated(run_id, event.status, end_time=round(event.time * 1000))
            return
        if not Path(event.file).is_file():
            raise Refused(f"{event.file} is gone")
        if event.kind == "model":
            self._send_model(client, run_id, Path(event.file))
            return
        if event.kind == "artifact":
            _taken(client.log_artifact, run_id, event.file)
            return
        from PIL import Image

        with Image.open(event.file) as image:
            picture = image.convert("RGB")
        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", event.key)
        stamp = round(event.time * 1000)
        _taken(client.log_image, run_id, picture, key=key, step=event.step, timestamp=stamp, synchronous=True)

    def _send_model(self, client: MlflowClient, run_id: str, file: Path) -> None:
        from dctc.tracking.package import log_model, register

        source = log_model(client, run_id, file, self._settings.tags.get("headline", "s1"))
        if self._settings.register:
            _taken(register, client, self._settings.register, source, run_id)

    def _open(self) -> tuple[MlflowClient, str]:
        if self._client is None or self.run_id is None:
            raise RuntimeError("send before connect")
        return self._client, self.run_id

    def _is_new(self, key: str, step: int, value: float) -> bool:
        """Steps arrive in order, so the last one tells all; at that step another value is a correction."""
        if key not in self._last:
            return True
        last_step, last = self._last[key]
        return step > last_step or (step == last_step and value != last and not math.isnan(value))

    def _find(self, client: MlflowClient, experiment: str) -> Run | None:
        if self.run_id is not None:
            run = _get_run(client, self.run_id)
            if run is not None:
                return run
            logger.warning(
                "MLflow at %s has no run %s (deleted, or another server): a new run gets the whole history",
                shown(self._settings.uri),
                self.run_id,
            )
        found = client.search_runs([experiment], f"tags.{TOKEN_TAG} = '{self._token}'", max_results=1)
        return found[0] if found else None

    def _create(self, client: MlflowClient, experiment: str) -> Run:
        tags = {TOKEN_TAG: self._token, "mlflow.user": _user()}
        started = round(self._settings.started * 1000) or None
        return client.create_run(experiment, start_time=started, tags=tags, run_name=self._settings.name)

    def _save_identity(self) -> None:
        identity = {
            "tracking_uri": self._settings.uri,
            "experiment": self._settings.experiment,
            "run_id": self.run_id,
            "token": self._token,
        }
        self._settings.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._identity, (json.dumps(identity, indent=2) + "\n").encode())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as dotted names and texts: text as it is, everything else as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def metric_key(name: str) -> str:
    """``name`` in the characters that MLflow allows, others replaced by ``_``."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]


def shown(uri: str) -> str:
    """``uri`` without a password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def is_missing(error: Exception) -> bool:
    """Whether an MLflow error says that what was asked for does not exist."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _taken(call: Callable[..., object], *arguments: object, **options: object) -> None:
    """Make the call; an answer that the request itself is wrong becomes :class:`Refused`."""
    from mlflow.exceptions import MlflowException

    try:
        call(*arguments, **options)
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise Refused(str(error).splitlines()[0][:300]) from error
        raise


def _get_run(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def experiment_of(client: MlflowClient, name: str) -> str:
    """The id of an experiment, which is made when missing."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server MLflow would put the files under the working directory of whoever made the experiment.
        database = database_of(client.tracking_uri)
        files = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return client.create_experiment(name, artifact_location=files)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # a run beside this one was faster
    if experiment is None or experiment.lifecycle_stage != "active":
        raise RuntimeError(f"experiment {name!r} is in MLflow's bin: restore it there, or set another run.experiment")
    _warn_of_moved(client, name, str(experiment.artifact_location))
    return str(experiment.experiment_id)


def _warn_of_moved(client: MlflowClient, name: str, files: str) -> None:
    """A database that was moved still says where its experiments' files were."""
    database = database_of(client.tracking_uri)
    own = (database.parent / "mlartifacts").as_uri() if database else files
    if files != own and files.startswith("file:") and files.endswith("/mlartifacts"):
        logger.warning("experiment %s keeps its files in %s, not in %s: was mlflow.db moved?", name, files, own)


def _log_settings(client: MlflowClient, run: Run, settings: RunSettings) -> None:
    """Tags anew; params only where missing, because MLflow forbids to change them: a changed one becomes a tag."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    run_id, logged = run.info.run_id, run.data.params
    wanted = {metric_key(key): value[:PARAM_LENGTH] for key, value in flatten(settings.params).items()}
    tags = {key: value[:TAG_LENGTH] for key, value in settings.tags.items()}
    tags |= {f"changed/{key}": value for key, value in wanted.items() if logged.get(key, value) != value}
    if "git_commit" in tags:
        tags["mlflow.source.git.commit"] = tags["git_commit"]
    params = [Param(key, value) for key, value in wanted.items() if key not in logged]
    records = [RunTag(key, value) for key, value in tags.items()]
    for start in range(0, max(len(params), len(records)), PER_BATCH):
        part = slice(start, start + PER_BATCH)
        client.log_batch(run_id, params=params[part], tags=records[part], synchronous=True)
    if settings.dataset is not None and not (run.inputs and run.inputs.dataset_inputs):
        dataset = Dataset(
            name=settings.dataset.name,
            digest=settings.dataset.digest[:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": settings.dataset.source}),
            profile=json.dumps({"sha256": settings.dataset.digest, **settings.dataset.profile}),
        )
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
