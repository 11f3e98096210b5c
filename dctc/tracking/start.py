"""From a run's configuration to its tracker."""

from __future__ import annotations

from pathlib import Path

from dctc.config import Config
from dctc.tracking.delivery import PENDING
from dctc.tracking.run import (
    RunSettings,
    Tracker,
    describe_dataset,
    git_commit,
    open_tracker,
    resolve_uri,
    send_pending,
)
from shards.manifest import Dataset


def start_tracking(
    config: Config,
    dataset: Dataset,
    folder: Path,
    names: tuple[str, str],
    strategy: str,
    headline: str,
    *,
    run_id: str | None,
    resumed_step: int | None,
    weights: str | None = None,
    main_process: bool,
) -> Tracker:
    """The tracker of this rank; the main one makes the MLflow run, or takes it up again.

    Args:
        folder: of the run, for ``metrics.jsonl``.
        names: experiment and run.
        strategy: how the processes came up.
        headline: the net whose score is the method's.
        run_id, resumed_step: of the checkpoint that the run goes on from, None for a fresh start.
        weights: SHA-256 of the file that the networks began with; the parameter ``weights_sha256``.
    """
    params = {key: value for key, value in config.flat().items() if not key.startswith("tracking.tags.")}
    if weights is not None:
        params["weights_sha256"] = weights
    settings = RunSettings(
        folder=folder,
        experiment=names[0],
        name=names[1],
        uri=resolve_uri(config.tracking.uri, config.run.output),
        tags={
            **config.tracking.tags,
            "method": config.method.name,
            "labelled_share": str(config.data.labelled_share),
            "seed": str(config.run.seed),
            "dataset_digest": dataset.digest,
            "git_commit": git_commit(),
            "strategy": strategy,
            "network": config.network.name,
            "headline": headline,
        },
        params=params,
        dataset=describe_dataset(dataset),
        run_id=run_id,
        resumed_step=resumed_step,
        register=config.tracking.register_as,
    )
    return open_tracker(settings, main_process=main_process, enabled=config.tracking.enabled)


def send_late(folder: Path) -> None:
    """Send what a finished run could not, if the server answers now; else it stays where it is, with a warning."""
    try:
        send_pending(folder)
    except Exception as error:  # whatever MLflow or the network raises: the run itself is finished
        print(f"warning: MLflow does not answer yet, {folder / PENDING} is kept ({type(error).__name__})")
