"""Killed at any moment and started again, a run of two processes ends with the bits of the uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dctc.engine.checkpoint import complete, latest, read_progress
from tests.tiny import SCRIPTS, command_line, launch, launch_arguments, run, start, write_config
from tests.weights import assert_same_weights, folder_of

KILLS = 25


def family(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not psutil.wait_procs(processes, timeout=30)[1]


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_25_kills_at_random_moments(tmp_path: Path, tiny_dataset: Path) -> None:
    """A checkpoint after each round: kills meet starting, reading, updates and writing alike.

    Of three sittings one is killed some seconds after its start, one within some rounds after its first checkpoint, one
    while a draft of a checkpoint lies there.
    """
    rounds = {"rounds": 120}
    whole = write_config(tmp_path / "whole.yaml", tiny_dataset, schedule=rounds)
    launch(2, whole)
    config = write_config(tmp_path / "killed.yaml", tiny_dataset, schedule=rounds)
    checkpoints = folder_of(config) / "checkpoints"
    draw = random.Random(0)
    drafts, kills = 0, 0
    for number in range(KILLS):
        before = latest(checkpoints)
        done_before = rounds_of(before)
        process = start(["accelerate", *launch_arguments(2), config], tmp_path)
        if number % 3 == 0:
            time.sleep(draw.uniform(1, 8))
        else:
            wait_for_another(checkpoints, before, process)
            if number % 3 == 1:
                time.sleep(draw.uniform(0, 0.3))
            while number % 3 == 2 and not list(checkpoints.glob("*.tmp")) and process.poll() is None:
                time.sleep(0.0005)
        drafts += bool(list(checkpoints.glob("*.tmp")))
        kills += process.poll() is None
        kill(family(psutil.Process(process.pid)))
        process.wait()
        assert rounds_of(latest(checkpoints)) >= done_before
    assert kills == KILLS, "some sittings ended by themselves"
    assert drafts >= 5, "too few kills met a checkpoint being written"
    launch(2, config)
    assert_same_weights(folder_of(config), folder_of(whole))
    assert not list(checkpoints.glob("*.tmp"))


def rounds_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else read_progress(checkpoint).rounds


def wait_for_another(checkpoints: Path, before: Path | None, process: subprocess.Popen[bytes]) -> None:
    """Until there is a checkpoint that was not there before."""
    deadline = time.monotonic() + 120
    while latest(checkpoints) == before:
        assert time.monotonic() < deadline, "no new checkpoint"
        assert process.poll() is None, "ended by itself"
        time.sleep(0.005)


@pytest.mark.matrix
@pytest.mark.slow
def test_two_processes_then_one_then_two_are_equal_to_the_bit(tmp_path: Path, tiny_dataset: Path) -> None:
    """One process with two micro-batches adds up what two processes with one each add up, in the same order."""
    rounds = {"rounds": 6}
    whole = write_config(tmp_path / "whole.yaml", tiny_dataset, schedule=rounds, run={"keep": 9})
    launch(2, whole)
    step = folder_of(whole) / "checkpoints" / "step-00000002"
    single = write_config(tmp_path / "single.yaml", tiny_dataset, schedule=rounds, run={"keep": 9})
    launch(1, single, "parallel.accumulation=2", f"run.resume={step}")
    assert_same_weights(folder_of(single), folder_of(whole))
    step = folder_of(single) / "checkpoints" / "step-00000004"
    pair = write_config(tmp_path / "pair.yaml", tiny_dataset, schedule=rounds)
    launch(2, pair, f"run.resume={step}")
    assert_same_weights(folder_of(pair), folder_of(whole))


# ---- launchers and ranks


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_a_launcher_that_is_killed_takes_its_ranks_along_with_a_checkpoint(
    tmp_path: Path, tiny_dataset: Path, processes: int
) -> None:
    config = write_config(
        tmp_path / "orphans.yaml", tiny_dataset, schedule={"rounds": 5000}, run={"checkpoint_every": 0}
    )
    process = start(["accelerate", *launch_arguments(processes), config], folder_of(config) / "metrics.jsonl")
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    (saved,) = complete(folder_of(config) / "checkpoints")
    assert read_progress(saved).rounds > 0


def pair_in_training(config: Path, said: Path) -> tuple[psutil.Popen, list[psutil.Process]]:
    """A launcher whose output goes to ``said``, and its two ranks in their order, with a checkpoint behind them."""
    with said.open("w") as output:
        process = psutil.Popen(
            [SCRIPTS / "accelerate", *launch_arguments(2), config], stdout=output, stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
    while not (folder_of(config) / "checkpoints" / "latest").exists():
        assert process.poll() is None
        time.sleep(0.01)
    ranks = [child for child in process.children(recursive=True) if "dctc/train.py" in command_line(child)]
    return process, sorted(ranks, key=lambda rank: rank.environ()["RANK"])


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_other_ends(tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "dies.yaml", tiny_dataset, schedule={"rounds": 5000})
    said = tmp_path / "said.txt"
    process, ranks = pair_in_training(config, said)
    dead = ranks[1]
    started = time.monotonic()
    dead.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert process.wait(timeout=30) == 1
    assert time.monotonic() - started < 30
    assert f"error: rank 0: rank 1 (process {dead.pid} on " in said.read_text()


@pytest.mark.matrix
def test_a_rank_that_freezes_is_named_and_the_other_ends_within_a_minute(tmp_path: Path, tiny_dataset: Path) -> None:
    """Its connections stay open, so that only its silence tells."""
    config = write_config(tmp_path / "freezes.yaml", tiny_dataset, schedule={"rounds": 5000})
    said = tmp_path / "said.txt"
    process, ranks = pair_in_training(config, said)
    other, frozen = ranks
    frozen.suspend()
    try:
        other.wait(timeout=60)
    finally:
        frozen.kill()
    assert f"rank 1 (process {frozen.pid} on " in said.read_text()
    process.wait(timeout=30)


# ---- one folder, one run


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "both.yaml", tiny_dataset, schedule={"rounds": 5000})
    first = start(["dctc", "train", config], folder_of(config) / "checkpoints" / "latest")
    try:
        arguments = [*launch_arguments(2), config]
        second = run("accelerate", *arguments, check=False, ACCELERATE_USE_CPU="true", DCTC_LOCK_WAIT="1")
        assert f"waiting up to 1 s for process {first.pid} on " in second.stdout
        assert second.returncode != 0
        assert second.stderr.count(f"error: {folder_of(config)}: process {first.pid} on ") == 1, "by one of both ranks"
    finally:
        first.kill()
        first.wait()
