"""Interrupted in any way and started again, a run ends with the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.tiny import interrupt, launch, launch_arguments, run, write_config
from tests.weights import assert_same_weights, folder_of

ROUNDS = {"rounds": 12}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    config = write_config(tmp_path_factory.mktemp("whole") / "whole.yaml", tiny_dataset, schedule=ROUNDS)
    run("dctc", "train", config)
    return folder_of(config)


def test_killed_after_round_three(tmp_path: Path, tiny_dataset: Path, uninterrupted: Path) -> None:
    config = write_config(tmp_path / "killed.yaml", tiny_dataset, schedule=ROUNDS)
    folder = folder_of(config)
    status = interrupt(["dctc", "train", config], signal.SIGKILL, folder / "checkpoints" / "step-00000003")
    assert status == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()
    run("dctc", "train", config)
    assert_same_weights(folder, uninterrupted)
    assert steps(folder) == list(range(1, 13)), "each round is logged once, the repeated ones not twice"


def test_sigterm_leaves_a_complete_checkpoint_and_exit_code_75(
    tmp_path: Path, tiny_dataset: Path, uninterrupted: Path
) -> None:
    config = write_config(tmp_path / "stopped.yaml", tiny_dataset, schedule=ROUNDS, run={"checkpoint_every": 0})
    folder = folder_of(config)
    status = interrupt(["dctc", "train", config], signal.SIGTERM, folder / "metrics.jsonl")
    assert status == 75
    assert (folder / "checkpoints" / "latest").read_text().startswith("step-")
    run("dctc", "train", config)
    assert_same_weights(folder, uninterrupted)


def test_two_processes_killed_and_run_again(tmp_path: Path, tiny_dataset: Path) -> None:
    whole = write_config(tmp_path / "whole.yaml", tiny_dataset, schedule=ROUNDS)
    launch(2, whole)
    config = write_config(tmp_path / "killed.yaml", tiny_dataset, schedule=ROUNDS)
    folder = folder_of(config)
    command = ["accelerate", *launch_arguments(2), config]
    interrupt(command, signal.SIGKILL, folder / "checkpoints" / "step-00000003")
    launch(2, config)
    assert_same_weights(folder, folder_of(whole))
    assert "finished, nothing to do" in launch(2, config).stdout, "and both ranks leave their group in good order"


def test_a_changed_setting_is_refused_by_name(tmp_path: Path, tiny_dataset: Path, uninterrupted: Path) -> None:
    config = write_config(uninterrupted.parents[2] / "whole.yaml", tiny_dataset, schedule=ROUNDS)
    done = run("dctc", "train", config, "optimizer.lr=0.002", check=False)
    assert done.returncode == 2
    assert "optimizer.lr (was 0.001, now 0.002)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_is_not_trained_again(tiny_dataset: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "model.safetensors").read_bytes()
    config = write_config(uninterrupted.parents[2] / "whole.yaml", tiny_dataset, schedule=ROUNDS)
    run("dctc", "train", config)
    assert (uninterrupted / "model.safetensors").read_bytes() == before
    assert steps(uninterrupted) == list(range(1, 13))
