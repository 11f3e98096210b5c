"""The largest batch that fits: real runs of a few rounds, each in processes of its own.

Nothing is simulated, so the answer holds for any strategy, and a rank that runs out of memory cannot leave the others
waiting: the launcher ends them, and the next trial starts anew.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from dctc.config import Config, load_config
from dctc.methods import build_method, parse_options
from dctc.networks import NetworkSpec
from shards.errors import InputError
from shards.manifest import Dataset

ROUNDS = 3  # the first one allocates, the others show the speed
FULL = "is full. Try in this order"  # of dctc.engine.faults
KILLED = (-9, 137)  # by the kernel, when a machine's memory is full


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        labelled, unlabelled: tiles of a micro-batch on a rank.
        fits: whether it ran to its end.
        memory_gib: largest peak of any rank, of the GPU or, on CPU, of the process; NaN where it did not fit.
        tiles_per_s: of all ranks and both streams; NaN where it did not fit.
    """

    labelled: int
    unlabelled: int
    fits: bool
    memory_gib: float = math.nan
    tiles_per_s: float = math.nan


@dataclass(frozen=True)
class Search:
    """Trials of one configuration.

    Attributes:
        file, overrides: of the configuration.
        command: what starts the trainer; configuration and overrides follow.
        world: ranks that it starts.
    """

    file: Path
    overrides: Sequence[str]
    command: Sequence[str]
    world: int

    @property
    def config(self) -> Config:
        """The configuration."""
        return load_config(self.file, self.overrides)

    def trials(self) -> Iterator[Trial]:
        """Double the batch until it does not fit, then halve the distance until that is an eighth of what fits.

        It ends, too, when a round would see every training tile.

        Raises:
            InputError: a trial failed for another reason than memory.
        """
        fits, fails = 0, self._most() + 1
        size = 1
        while fits < fails - 1 and (size == 1 or fails - fits > max(1, fits // 8)):
            trial = self._try(size)
            yield trial
            fits, fails = (size, fails) if trial.fits else (fits, size)
            size = min(2 * size, fails - 1) if trial.fits and fails > self._most() else (fits + fails) // 2

    def advice(self, trials: Sequence[Trial]) -> list[str]:
        """What to put into the configuration, in words."""
        data, accumulation = self.config.data, self.config.parallel.accumulation
        fitting = [trial for trial in trials if trial.fits]
        if not fitting:
            return ["not even one tile fits: a smaller network.width, or parallel.activation_checkpointing=true"]
        most = max(fitting, key=lambda trial: trial.labelled)
        fastest = max(fitting, key=lambda trial: trial.tiles_per_s)
        lines = [
            (
                f"largest micro-batch that fits on a rank: {most.labelled} labelled + {most.unlabelled} unlabelled "
                f"tiles ({most.memory_gib:.2f} GiB); {fastest.labelled} + {fastest.unlabelled} was the fastest "
                f"({fastest.tiles_per_s:.1f} tiles/s)"
            ),
            (
                f"largest batches without accumulation on {self.world} rank(s): data.batch_labelled="
                f"{most.labelled * self.world} data.batch_unlabelled={most.unlabelled * self.world} (another batch is "
                "another training: its result differs)"
            ),
        ]
        cuts = (n for n in range(1, data.batch_labelled + 1) if data.batch_labelled % (n * self.world) == 0)
        enough = next((n for n in cuts if data.batch_labelled // (n * self.world) <= most.labelled), None)
        if enough is not None:
            lines.append(
                f"for the batches of this configuration ({data.batch_labelled} + {data.batch_unlabelled}): "
                f"parallel.accumulation={enough} (now {accumulation}); the result is the same for any value"
            )
        return lines

    def _unit(self) -> tuple[int, int]:
        """The smallest pair of tiles in the configuration's proportion."""
        data = self.config.data
        divisor = math.gcd(data.batch_labelled, data.batch_unlabelled)
        labelled, unlabelled = data.batch_labelled // divisor, data.batch_unlabelled // divisor
        # What a method mixes does not depend on its networks; these are small.
        method = build_method(self.config.method.name, NetworkSpec(1, 2, width=4), self.config.method.options)
        mixed_labelled = data.cutmix or method.labelled_needs.boxes is not None
        odd = (mixed_labelled and labelled % 2) or (method.unlabelled_needs.boxes is not None and unlabelled % 2)
        pairs = 2 if odd else 1
        return labelled * pairs, unlabelled * pairs

    def _all_phases(self) -> list[str]:
        """Settings that make a phase which begins later begin at once: it takes memory, too."""
        known = fields(parse_options(self.config.method.name, {}))
        return [f"method.{f.name}=0" for f in known if f.name.endswith(("_start", "_ramp"))]

    def _most(self) -> int:
        data = self.config.data
        tiles = Dataset.open(data.dataset, data.cache_settings).manifest.splits["train"].tiles
        return max(1, tiles // (max(self._unit()) * self.world))

    def _try(self, size: int) -> Trial:
        labelled, unlabelled = (tiles * size for tiles in self._unit())
        with TemporaryDirectory(prefix="dctc-batch-size-") as folder:
            settings = [
                *self.overrides,
                f"data.batch_labelled={labelled * self.world}", f"data.batch_unlabelled={unlabelled * self.world}",
                "parallel.accumulation=1", f"schedule.rounds={ROUNDS}", f"run.output={folder}", "run.experiment=trial",
                "run.name=trial", "run.log_every=1", "run.checkpoint_every=0", "run.pictures_every=0",
                "tracking.enabled=false", "evaluation.test=false", "network.weights=null", *self._all_phases(),
            ]  # fmt: skip
            done = subprocess.run(
                [*self.command, str(self.file), *settings], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                lines = (Path(folder) / "trial" / "trial" / "metrics.jsonl").read_text().splitlines()
                logged = [json.loads(line)["values"] for line in lines]
                last = [values for values in logged if "perf/tiles_per_s" in values][-1]
                return Trial(labelled, unlabelled, True, last["perf/peak_memory_gib"], last["perf/tiles_per_s"])
        said = done.stderr + done.stdout
        if done.returncode in KILLED or FULL in said or "exitcode: -9" in said or "exitcode  : -9" in said:
            return Trial(labelled, unlabelled, False)
        raise InputError(_reason(said) or f"a trial ended with {done.returncode}:\n{said[-2000:]}")


def find_batch_size(search: Search, show: Callable[[str], None]) -> None:
    """Run the trials of a search, showing each, and the advice."""
    trials = []
    for trial in search.trials():
        trials.append(trial)
        result = f"{trial.memory_gib:.2f} GiB, {trial.tiles_per_s:.1f} tiles/s" if trial.fits else "does not fit"
        show(f"{trial.labelled} labelled + {trial.unlabelled} unlabelled tiles on each of {search.world}: {result}")
    for line in search.advice(trials):
        show(line)


def _reason(said: str) -> str | None:
    """The trainer's own message."""
    told = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    return told[0] if told else None
