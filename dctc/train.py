"""What ``accelerate launch`` runs: ``accelerate launch dctc/train.py CONFIG [key=value ...]``."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, this folder is sys.path[0], where dctc's own modules would shadow others of the same name.
if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import warnings

from dctc.config import Config, load_config
from dctc.engine.build import finish, is_finished, locate, make_folder, prepare, resolve, run_folder, settle
from dctc.engine.faults import end_with_launcher, explained, occupy, show_input_error
from dctc.engine.parallel import Parallel
from dctc.engine.preempt import EXIT_PREEMPTED, StopRequest
from dctc.tracking.start import send_late, start_tracking
from shards.errors import InputError
from shards.manifest import Dataset


def main(arguments: list[str]) -> int:
    """Train one run; returns the exit code of product.md: 0 done, 75 stopped after a complete checkpoint."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    stop = StopRequest()
    end_with_launcher()
    config = resolve(load_config(arguments[0], arguments[1:]))
    dataset = Dataset.open(config.data.dataset, config.data.cache_settings)
    with Parallel(config.parallel.strategy, config.parallel.timeout) as parallel, explained(parallel, config):
        return train(settle(config, parallel.device), dataset, parallel, stop)


def train(config: Config, dataset: Dataset, parallel: Parallel, stop: StopRequest) -> int:
    """One run in processes that are up; returns the exit code."""
    occupy(run_folder(config, dataset), parallel)  # before its checkpoints are looked at
    run = locate(config, dataset, parallel)
    if is_finished(config, run):
        if parallel.is_main:
            print(f"{run.folder}: finished, nothing to do; another run.name or run.seed makes a new run")
            send_late(run.folder)
        return 0
    make_trainer = prepare(config, dataset, parallel, run, stop)
    make_folder(config, run, parallel)
    tracker = start_tracking(
        config, dataset, run.folder, (run.experiment, run.name), parallel.strategy,
        make_trainer.keywords["method"].headline, run_id=run.progress.tracking_id,
        resumed_step=None if run.source is None else run.progress.rounds, weights=run.progress.weights,
        main_process=parallel.is_main,
    )  # fmt: skip
    status = "FAILED"
    try:
        trainer = make_trainer(tracker)
        finished = trainer.run()
        if finished:
            finish(trainer, config)
        status = "FINISHED" if finished else "KILLED"
    finally:
        tracker.finish(status)
    return 0 if finished else EXIT_PREEMPTED


def command(arguments: list[str]) -> int:
    """:func:`main`, with bad input as one message and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a checkpoint of one process
    try:
        return main(arguments)
    except InputError as error:
        show_input_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
