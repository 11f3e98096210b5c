"""Interrupted in any way and started again, a run ends with the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from dctc.engine.checkpoint import read_progress
from tests.tiny import interrupt, launch, launch_arguments, losses, run, write_config
from tests.weights import assert_same_weights, folder_of

ROUNDS = {"rounds": 12}
EXTENDED = [
    "method.views=2", "method.cutmix=true", "method.feature_dropout=0.5", "method.threshold=adaptive",
    "method.class_balance=0.5", "method.attention=false", "method.teacher_pull=0.1", "method.labels_for_students=true",
]  # fmt: skip


def steps(folder: Path) -> list[int]:
    """Of the logged rounds; what the whole run took stands beside the last one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/lr" in line["values"]]


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


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        # Its stages begin in rounds 2, 4, 6, 8 and 10: it is killed within one, and goes on in it.
        pytest.param("dst_cbc", [], marks=pytest.mark.matrix),
        pytest.param("mean_teacher", [], marks=pytest.mark.matrix),
        pytest.param("cps", ["method.cutmix=true"], marks=pytest.mark.matrix),
        pytest.param("dctc", ["method.round=epoch", "data.augment=strong"], marks=pytest.mark.matrix),
        pytest.param("unimatch", ["method.confidence=0.2"], marks=pytest.mark.matrix),
        pytest.param("dctc", EXTENDED, marks=pytest.mark.matrix),
    ],
)
def test_each_method_goes_on_where_it_was(tmp_path: Path, tiny_dataset: Path, method: str, keys: list[str]) -> None:
    configs = [
        write_config(tmp_path / f"{name}.yaml", tiny_dataset, method, schedule=ROUNDS, run={"keep": 12})
        for name in ("whole", "killed")
    ]
    whole, folder = map(folder_of, configs)
    run("dctc", "train", configs[0], *keys)
    interrupt(["dctc", "train", configs[1], *keys], signal.SIGKILL, folder / "checkpoints" / "step-00000005")
    run("dctc", "train", configs[1], *keys)
    assert_same_weights(folder, whole)
    memories = [read_progress(path / "checkpoints" / "step-00000012").memory for path in (whole, folder)]
    assert memories[0] == memories[1]
    assert bool(memories[0]) == (method == "dst_cbc" or keys is EXTENDED)


@pytest.mark.matrix
def test_thresholds_and_weights_of_self_training_are_the_same_on_two_ranks(tmp_path: Path, tiny_dataset: Path) -> None:
    """The histograms of confidence are summed over the ranks, so each has those of the whole unlabelled set."""
    configs = [
        write_config(
            tmp_path / f"{name}.yaml", tiny_dataset, "dst_cbc", schedule={"rounds": 3},
            optimizer={"name": "sgd", "lr": 0.01}, evaluation={"batch": 2},
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for processes, config in enumerate(configs, 1):
        launch(processes, config, "method.stages=2", "method.start=0.34")
    one, two = map(folder_of, configs)
    thresholds = [read_progress(folder / "checkpoints" / "step-00000003").memory["thresholds"] for folder in (one, two)]
    assert thresholds[0] == thresholds[1]
    assert any(thresholds[0]), "the last stage takes all pixels, down to the least confident one"
    assert losses(one)[-1] == pytest.approx(losses(two)[-1], rel=1e-5)


@pytest.mark.matrix
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
