"""From a run's configuration and a dataset to a trainer, and what happens when the training is over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dctc.config import Config, DataConfig, MethodConfig, nearest
from dctc.data.order import LABELLED, UNLABELLED, Layout
from dctc.engine.checkpoint import Checkpoints, Progress, latest, read_progress
from dctc.engine.faults import occupy
from dctc.engine.flops import RunFlops, peak_flops, round_flops
from dctc.engine.meters import Compute
from dctc.engine.model import begin_with_weights, describe, make_method, network_spec
from dctc.engine.parallel import Parallel
from dctc.engine.precision import Precision, UnsupportedPrecision
from dctc.engine.preempt import StopRequest
from dctc.engine.profile import Profile
from dctc.engine.recompute import recompute_blocks
from dctc.engine.schedule import Schedule
from dctc.engine.streams import idle_data, training_stream, watched_rows
from dctc.engine.trainer import Every, Trainer
from dctc.engine.update import OptimizerSpec, Updater
from dctc.engine.watch import Watch
from dctc.evaluation.evaluate import peak_memory_gib
from dctc.methods import Method, OptionError, parse_options
from dctc.methods.base import Length
from shards.errors import InputError
from shards.index import Index
from shards.manifest import Dataset


@dataclass(frozen=True)
class Run:
    """Where a run lives and where it goes on from.

    Attributes:
        folder: ``OUTPUT/EXPERIMENT/NAME``.
        source: the checkpoint to go on from, None for a fresh start.
    """

    experiment: str
    name: str
    folder: Path
    progress: Progress
    source: Path | None


def resolve(config: Config) -> Config:
    """The configuration with every option of its method written out, so that a default cannot change behind a run.

    Raises:
        InputError: for an unknown method or a wrong option, naming the key and the nearest valid name.
    """
    try:
        options = parse_options(config.method.name, config.method.options)
    except OptionError as error:
        hint = f"; {nearest(error.wrong, error.known)}" if error.known else ""
        raise InputError(f"key method.{error.key}: {error}{hint}") from None
    method = MethodConfig.model_validate({"name": config.method.name, **asdict(options)})
    return config.model_copy(update={"method": method})


def completed(config: Config, written: Mapping[str, Any]) -> dict[str, Any]:
    """The result settings that a run once wrote; keys and options that are newer than it at their defaults.

    The default of one that is added is what was done before, so that runs of earlier versions can go on.
    """
    least = Config(data=DataConfig(dataset=config.data.dataset), method=MethodConfig(name=config.method.name))
    return resolve(least).result_settings() | dict(written)


NAME_LENGTH = 255  # bytes of a folder's name, in every usual file system


def run_folder(config: Config, dataset: Dataset) -> Path:
    """Where the run lives."""
    experiment, name = _names(config, dataset)
    return config.run.output / experiment.replace("/", "_") / name.replace("/", "_")


def _names(config: Config, dataset: Dataset) -> tuple[str, str]:
    """Of the experiment and of the run. Raises :class:`InputError` for one that names no folder."""
    experiment = config.run.experiment or f"{dataset.manifest.name}-{dataset.manifest.protocol}"
    name = config.run.name or f"{config.method.name}-{config.data.labelled_share}-s{config.run.seed}"
    for key, value in (("experiment", experiment), ("name", name)):
        if value in (".", ".."):
            raise InputError(f"run.{key} {value!r}: is no name of a folder, choose another")
        if len(os.fsencode(value)) > NAME_LENGTH:
            raise InputError(f"run.{key} {value[:40]!r}...: a folder's name has at most {NAME_LENGTH} bytes")
    return experiment, name


def locate(config: Config, dataset: Dataset, parallel: Parallel) -> Run:
    """Find the run's folder and its latest checkpoint; nothing is written.

    Resume precedence: 1. ``run.resume`` is a path: that checkpoint. 2. ``auto``: the latest complete one of the folder.
    3. none there: a fresh start. ``never`` refuses a folder that has checkpoints, so that two runs cannot mix.

    Raises:
        InputError: a checkpoint of other data or settings (the keys are named), or ``never`` as above.
    """
    experiment, name = _names(config, dataset)
    folder = run_folder(config, dataset)
    source = parallel.from_main(_resume_source(config.run.resume, folder))
    progress = Progress(dataset=dataset.digest, settings=config.result_settings())
    if source is not None:
        progress = read_progress(source)
        progress = replace(progress, settings=completed(config, progress.settings))
        progress.must_match(dataset.digest, config.result_settings(), source)
    return Run(experiment, name, folder, progress, source)


def _resume_source(resume: str, folder: Path) -> Path | None:
    found = latest(folder / "checkpoints")
    if resume == "auto":
        return found
    if resume != "never":
        return Path(resume)
    if found is not None:
        raise InputError(f"{folder}: has checkpoints of an earlier run; choose another run.name or run.resume=auto")
    return None


def make_folder(config: Config, run: Run, parallel: Parallel) -> None:
    """Make the run's folder, lock it, and write ``config.yaml`` into it. All ranks call it.

    Raises:
        InputError: that is not allowed, or another run is in it, or was since :func:`locate` looked for one.
    """
    _write(run.folder, parallel, lambda: run.folder.mkdir(parents=True, exist_ok=True))
    occupy(run.folder, parallel)
    if parallel.from_main(_resume_source(config.run.resume, run.folder)) != run.source:
        raise InputError(f"{run.folder}: another process has trained there meanwhile: give the same command again")
    _write(run.folder, parallel, partial(_write_config, config, run.folder))


def _write_config(config: Config, folder: Path) -> None:
    draft = folder / ".config.yaml"
    draft.write_text(yaml.safe_dump(config.plain(), sort_keys=False))
    draft.replace(folder / "config.yaml")


def _write(folder: Path, parallel: Parallel, action: Callable[[], object]) -> None:
    """Something that one process alone does to the run's folder; raises :class:`InputError` in all of them."""
    problem = None
    if parallel.is_main:
        try:
            action()
        except OSError as error:
            problem = error.strerror
    if (problem := parallel.from_main(problem)) is not None:
        raise InputError(f"{folder}: cannot write the run's folder ({problem}); set run.output")


def is_finished(config: Config, run: Run) -> bool:
    """Whether the run has trained to its end, with its test and report written: then there is nothing left to do."""
    path = run.folder / "report.json"
    if run.source is None or not path.exists():
        return False
    report = json.loads(path.read_text())
    return bool(report["rounds"] == run.progress.rounds and report["tested"] >= config.evaluation.test)


def prepare(config: Config, dataset: Dataset, parallel: Parallel, run: Run, stop: StopRequest) -> partial[Trainer]:
    """Put everything together but the tracker, which no wrong setting shall have started: call the result with one.

    Raises:
        InputError: for settings that cannot work, before anything is written.
    """
    index = Index.open(dataset)
    layout = Layout(parallel.world, parallel.rank, config.parallel.accumulation)
    labelled_rows = index.labelled_rows(config.data.labelled_share)
    if not len(labelled_rows):
        raise InputError(f"{dataset.location}: no labelled training tile, and method {config.method.name} needs labels")
    precision = _precision(config, parallel.device)
    must_go_together(config, parallel.strategy)
    torch.manual_seed(config.run.seed)  # nothing else draws from a global generator
    method = make_method(config, dataset, parallel)
    checkpoints = Checkpoints(run.folder / "checkpoints", config.run.keep, parallel)
    if run.source is not None:
        checkpoints.load_weights(run.source, method.parts)
    else:
        run.progress.weights = begin_with_weights(config, dataset, parallel, method)
    _make_ready([precision.lay_out(module) for module in method.parts.values()], config)
    updater = Updater(method.parts, _optimizer_spec(config), parallel, precision, config.parallel.offload)
    method.parts.update(updater.modules)
    schedule = _schedule(config, len(index.rows("train")))
    method.length = Length(schedule.rounds, schedule.epoch)
    for text in [*method.idle_options(), *idle_data(config, method)]:
        _warn(parallel.is_main, text)
    _take_up(run, checkpoints, updater, method)
    unlabelled_rows = index.unlabelled_rows(config.data.labelled_share)
    stream = partial(training_stream, config, dataset, layout)
    watch = Watch(
        method=method,
        parts=updater.parts,
        dataset=dataset,
        parallel=parallel,
        precision=precision,
        layout=layout,
        folder=run.folder,
        rows=watched_rows(dataset, index, labelled_rows, unlabelled_rows, config.evaluation.pictures),
        batch=config.evaluation.batch,
        workers=config.data.workers,
        describe=partial(describe, config, dataset),
        warn=partial(_warn, parallel.is_main),
        warn_from=schedule.rounds // 5,
        substitute=config.data.on_damage == "substitute",
        compiled=config.parallel.compile != "none",
    )
    return partial(
        Trainer,
        method=method,
        updater=updater,
        precision=precision,
        parallel=parallel,
        labelled=stream(LABELLED, labelled_rows, method.labelled_needs),
        unlabelled=stream(UNLABELLED, unlabelled_rows, method.unlabelled_needs) if method.uses_unlabelled else None,
        schedule=schedule,
        every=_intervals(config, schedule),
        checkpoints=checkpoints,
        progress=run.progress,
        stop=stop,
        watch=watch,
        compute=_compute(config, dataset, parallel, method),
        profile=Profile(config.run.profiled(schedule.rounds), run.folder / "profile", parallel.rank),
    )


def _schedule(config: Config, training_tiles: int) -> Schedule:
    length = config.schedule
    return Schedule.plan(
        training_tiles, config.data.batch_labelled, length.epochs, length.warmup, length.rounds, length.shape
    )


def _take_up(run: Run, checkpoints: Checkpoints, updater: Updater, method: Method) -> None:
    """What a run that goes on has beside its weights."""
    if run.source is None:
        return
    checkpoints.load_optimizers(run.source, updater.parts)
    method.memory = dict(run.progress.memory)
    scale = updater.precision.loss_scale
    if scale is not None and run.progress.loss_scale is not None:
        scale.value, since = run.progress.loss_scale
        scale.since = int(since)


def _compute(config: Config, dataset: Dataset, parallel: Parallel, method: Method) -> Compute | None:
    """What MFU is made of, on a GPU (main rank). Counting takes a second or two."""
    if parallel.device.type != "cuda" or not parallel.is_main:
        return None
    if (flops := _flops(config, dataset, method)) is None:
        return None
    name = config.precision.dtype
    assert name != "auto"
    return Compute(flops, peak_flops(torch.cuda.get_device_name(parallel.device), name))


def _flops(config: Config, dataset: Dataset, method: Method) -> RunFlops | None:
    """Operations of the rounds over all ranks; None, with a warning, where they cannot be counted."""
    unlabelled = config.data.batch_unlabelled if method.uses_unlabelled else 0
    rounds = method.length.rounds
    count = partial(
        round_flops, config.method.name, network_spec(config, dataset), config.method.options,
        config.data.batch_labelled, unlabelled, dataset.manifest.tile_size, rounds=rounds,
    )  # fmt: skip
    firsts = sorted({0, *(first for first in method.changes() if first < rounds)})
    lasts = [first - 1 for first in [*firsts[1:], rounds]]  # a method that names no change is counted far along
    try:
        return RunFlops({first: count(step=last) for first, last in zip(firsts, lasts, strict=True)}, rounds)
    except Exception as error:  # a method may compute what fake tensors cannot, and train all the same
        _warn(
            True, f"the operations of a round cannot be counted, so neither can MFU ({type(error).__name__}: {error})"
        )
        return None


def finish(trainer: Trainer, config: Config) -> None:
    """After the last round: the model file, the test, the report, all of it into the tracker too."""
    progress, watch, tracker = trainer.progress, trainer.watch, trainer.tracker
    progress.tracking_id = tracker.await_run_id()  # the model file names its run
    model = watch.save_model("model.safetensors", progress)
    with trainer.parallel.own_errors():
        evaluation = watch.test() if config.evaluation.test else None
    tiles = watch.save_tiles()
    cost = _cost(trainer, config)
    report = watch.report(progress, evaluation, config.evaluation.test, trainer.tiles_per_round, cost)
    if not trainer.parallel.is_main:
        return
    tracker.metrics(cost, progress.rounds)
    if evaluation is not None:
        tracker.metrics(evaluation.as_metrics("test"), progress.rounds)
        print(f"test mIoU {evaluation.scores(trainer.method.headline).miou:.4f} ({trainer.method.headline})")
    tracker.model(model)
    files = [report, watch.folder / "config.yaml", *watch.folder.glob("test-*")]
    for file in files if tiles is None else [*files, tiles]:
        tracker.artifact(file)
    print(f"model {model}\nreport {report}")


def _cost(trainer: Trainer, config: Config) -> dict[str, float]:
    """Seconds of training, memory of the fullest rank and, on the main rank, mean operations of a round."""
    cost = {"perf/train_seconds": trainer.progress.seconds}
    cost["perf/peak_memory_gib"] = max(trainer.parallel.gather(peak_memory_gib(trainer.parallel.device)))
    if not trainer.parallel.is_main:
        return cost
    known = trainer.compute  # counted before the first round, on a GPU
    flops = _flops(config, trainer.watch.dataset, trainer.method) if known is None else known.flops
    return cost if flops is None else cost | {"perf/round_gflop": flops.mean / 1e9}


def settle(config: Config, device: torch.device) -> Config:
    """The configuration with ``precision.dtype: auto`` as it is on this device."""
    if config.precision.dtype != "auto":
        return config
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = config.precision.model_copy(update={"dtype": "bf16" if has_bf16 else "fp32"})
    return config.model_copy(update={"precision": precision})


def _precision(config: Config, device: torch.device) -> Precision:
    try:
        return Precision(config.precision.dtype, device, config.precision.channels_last)
    except UnsupportedPrecision as error:
        raise InputError(f"key precision.dtype is {config.precision.dtype}: {error}") from None


def must_go_together(config: Config, strategy: str) -> None:
    """Raises :class:`InputError` for settings that a strategy cannot have, naming the key."""
    zero = strategy.startswith("zero")
    if config.parallel.offload and not zero:
        raise InputError(f"key parallel.offload: is DeepSpeed's (zero1, zero2, zero3), and the strategy is {strategy}")
    if zero and config.precision.dtype == "fp16":
        raise InputError(
            f"key precision.dtype is fp16: {strategy} keeps one loss scale an engine, and an update here has one "
            "backward pass through several engines: use bf16, or fsdp2"
        )
    if zero and config.optimizer.nonfinite == "skip":
        raise InputError(
            f"key optimizer.nonfinite is skip: an engine of {strategy} cannot leave out a step: use stop, or fsdp2"
        )
    if zero and config.parallel.compile != "none":
        raise InputError(
            f"key parallel.compile: is not offered with {strategy}: use none, ddp or fsdp2, or compile=none"
        )


def _make_ready(modules: Sequence[nn.Module], config: Config) -> None:
    """Recompute and compile parts, in place: their state-dict keys stay, and wrappers go around them."""
    if config.parallel.activation_checkpointing and not sum([recompute_blocks(module) for module in modules]):
        raise InputError(
            f"key parallel.activation_checkpointing: network {config.network.name} has no Block "
            "(dctc.networks.block) that could be computed again"
        )
    if config.parallel.compile != "none":
        for module in modules:
            module.compile(mode=None if config.parallel.compile == "default" else config.parallel.compile)


def _optimizer_spec(config: Config) -> OptimizerSpec:
    return OptimizerSpec(**config.optimizer.model_dump())


def _intervals(config: Config, schedule: Schedule) -> Every:
    def rounds(value: int | None) -> int:
        return schedule.epoch if value is None else value

    return Every(
        log=config.run.log_every,
        validate=rounds(config.evaluation.every),
        picture=rounds(config.run.pictures_every),
        checkpoint=rounds(config.run.checkpoint_every),
    )


def _warn(enabled: bool, text: str) -> None:
    if enabled:
        print(f"warning: {text}", flush=True)
