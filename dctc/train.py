"""What ``accelerate launch`` runs: ``accelerate launch dctc/train.py CONFIG [key=value ...]``."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, this folder is sys.path[0], where dctc's own modules would shadow others of the same name.
if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import warnings

from dctc.config import Config, load_config
from dctc.engine.build import Run, build_trainer, finish, locate
from dctc.engine.parallel import Parallel
from dctc.engine.preempt import EXIT_PREEMPTED, StopRequest
from dctc.engine.trainer import Tracker
from dctc.tracking.run import RunSettings, describe_dataset, git_commit, open_tracker, resolve_uri
from shards.errors import InputError
from shards.manifest import Dataset


def main(arguments: list[str]) -> int:
    """Train one run; returns the exit code of product.md: 0 done, 75 stopped after a complete checkpoint."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    config = load_config(arguments[0], arguments[1:])
    dataset = Dataset.open(config.data.dataset)
    stop = StopRequest()
    parallel = Parallel(config.parallel.strategy)
    run = locate(config, dataset, parallel)
    tracker = start_tracking(config, dataset, run, parallel)
    status = "FAILED"
    try:
        trainer = build_trainer(config, dataset, parallel, run, tracker, stop)
        finished = trainer.run()
        if finished:
            finish(trainer, config)
        status = "FINISHED" if finished else "KILLED"
    finally:
        tracker.finish(status)
        parallel.close()
    return 0 if finished else EXIT_PREEMPTED


def start_tracking(config: Config, dataset: Dataset, run: Run, parallel: Parallel) -> Tracker:
    """Open the tracker of this rank; the main one makes the MLflow run, or takes it up again."""
    tags = {
        "method": config.method.name,
        "labelled_share": str(config.data.labelled_share),
        "seed": str(config.run.seed),
        "dataset_digest": dataset.digest,
        "git_commit": git_commit(),
        "strategy": parallel.strategy,
    }
    settings = RunSettings(
        folder=run.folder,
        experiment=run.experiment,
        name=run.name,
        uri=resolve_uri(config.tracking.uri, config.run.output),
        tags=tags,
        params=config.flat(),
        dataset=describe_dataset(dataset),
        run_id=run.progress.tracking_id,
        resumed_step=None if run.source is None else run.progress.rounds,
    )
    return open_tracker(settings, main_process=parallel.is_main, enabled=config.tracking.enabled)


def command(arguments: list[str]) -> int:
    """:func:`main`, with bad input as one message and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a checkpoint of one process
    try:
        return main(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
