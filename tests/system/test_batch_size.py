"""`dctc train --find-batch-size`: what it tries, what it says, and real trials in too little memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from dctc.batch_size import Search, Trial
from tests.tiny import ROOT, SCRIPTS, make_dataset, run, write_config

TILES = 45  # in the training split of the tiny dataset


@dataclass(frozen=True)
class Limited(Search):
    """A search whose trials fit up to a number of tiles."""

    limit: int = 0
    tried: list[int] = field(default_factory=list)

    def _try(self, size: int) -> Trial:
        labelled, unlabelled = (tiles * size for tiles in self._unit())
        self.tried.append(labelled)
        fits = labelled <= self.limit
        return Trial(labelled, unlabelled, fits, labelled * 0.1, labelled * 10.0) if fits else Trial(labelled, 2, False)


def search(config: Path, limit: int, *overrides: str, world: int = 1, command: Sequence[str] = ()) -> Limited:
    return Limited(config, overrides, command, world, limit)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", tiny_dataset)


@pytest.mark.parametrize(
    ("keys", "unit"),
    [
        ([], (1, 1)),
        (["data.batch_unlabelled=8"], (1, 2)),
        (["data.cutmix=true"], (2, 2)),
        (["method.name=cps", "method.cutmix=true"], (2, 2)),
        (["method.name=cps", "method.cutmix=true", "data.batch_unlabelled=8"], (1, 2)),
        (["method.name=cps", "data.batch_labelled=8"], (2, 1)),
    ],
)
def test_what_is_mixed_goes_in_pairs(config: Path, keys: list[str], unit: tuple[int, int]) -> None:
    assert search(config, TILES, *keys)._unit() == unit


@pytest.mark.parametrize("limit", range(1, TILES + 1))
def test_the_search_comes_within_an_eighth_of_what_fits_and_never_tries_twice(config: Path, limit: int) -> None:
    found = search(config, limit)
    best = max(trial.labelled for trial in found.trials() if trial.fits)
    assert best <= limit
    assert limit - best <= max(1, best // 8)
    assert len(set(found.tried)) == len(found.tried) <= 11
    assert max(found.tried) <= TILES, "no more tiles than there are"


def test_the_advice_is_the_least_accumulation_that_fits(config: Path) -> None:
    found = search(config, 3, "data.batch_labelled=24", "data.batch_unlabelled=24", world=2)
    advice = " ".join(found.advice(list(found.trials())))
    assert "largest micro-batch that fits on a rank: 3 labelled + 3 unlabelled" in advice
    assert "data.batch_labelled=6 data.batch_unlabelled=6" in advice
    assert "(24 + 24): parallel.accumulation=4 (now 1)" in advice  # 24 / (2 ranks x 3 tiles)


def test_the_proportion_of_the_streams_is_kept(config: Path) -> None:
    found = search(config, 4, "data.batch_labelled=4", "data.batch_unlabelled=8")
    trials = [trial for trial in found.trials() if trial.fits]
    assert {trial.unlabelled / trial.labelled for trial in trials} == {2.0}


def test_nothing_fits(config: Path) -> None:
    found = search(config, 0)
    assert "not even one tile" in found.advice(list(found.trials()))[0]
    assert found.tried == [1]


@pytest.mark.matrix
@pytest.mark.parametrize(("launch", "mebibytes"), [(None, 1024), ("cpu_pair.yaml", 750)])
def test_real_trials_in_little_memory(tmp_path: Path, launch: str | None, mebibytes: int) -> None:
    """A limit on the processes' memory stands for a full GPU: the same trainer runs out of it in the same place."""
    dataset = make_dataset(tmp_path, scenes=40, size=96, tile=96)
    written = write_config(tmp_path / "run.yaml", dataset, method="supervised", network={"width": 24})
    limits = (mebibytes * 2**20, mebibytes * 2**20)
    arguments = ["--launch", str(ROOT / "launch" / launch)] if launch else []
    done = subprocess.run(
        [SCRIPTS / "dctc", "train", written, "--find-batch-size", *arguments],
        capture_output=True, text=True, timeout=280, check=False, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limits),
        env={"PATH": str(SCRIPTS), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("does not fit" in line for line in lines), done.stdout
    assert any("GiB" in line and "tiles/s" in line for line in lines)
    assert any("largest micro-batch that fits on a rank" in line for line in lines)


def test_a_trial_that_fails_for_another_reason_says_it(config: Path) -> None:
    done = run("dctc", "train", config, "--find-batch-size", "data.dataset=/nowhere", check=False)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    done = run("dctc", "train", config, "--find-batch-size", "network.norm=sync", check=False)
    assert done.returncode == 2
    assert "network.norm is sync, which needs GPUs" in done.stderr


@pytest.mark.matrix
@pytest.mark.slow
def test_out_of_memory_says_what_to_change(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, scenes=40, size=96, tile=96)
    keys = {"data": {"batch_labelled": 32}, "network": {"width": 24}}
    written = write_config(tmp_path / "run.yaml", dataset, method="supervised", **keys)
    assert yaml.safe_load(written.read_text())["data"]["batch_labelled"] == 32
    done = subprocess.run(
        [sys.executable, "dctc/train.py", written], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30)),
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: rank 0: the memory of this machine is full. Try in this order: parallel.accumulation=2"
    )
    assert "activation_checkpointing=true" in last
    assert "--find-batch-size" in last
