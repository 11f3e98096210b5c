"""Faults while training: a loss that is not finite, file descriptors, a tracker that is not asked for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest

from dctc.data.loaders import Normaliser, evaluation_batches
from dctc.data.order import Layout
from dctc.data.tiles import TileDataset
from dctc.engine.checkpoint import complete, latest, read_progress
from dctc.train import command
from shards.index import Index
from shards.manifest import Dataset
from tests.tiny import launch_arguments, start, write_config


def test_a_loss_that_is_not_finite_names_round_and_tiles_and_leaves_no_checkpoint_to_go_on_from(
    tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints come before the first log here: the check must not wait for the log."""
    optimizer = {"name": "sgd", "lr": 1e30}
    config = write_config(tmp_path / "wild.yaml", tiny_dataset, optimizer=optimizer, run={"log_every": 100})
    with pytest.raises(SystemExit) as ended:
        command([str(config)])
    assert ended.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    found = re.match(r"error: round (\d+): loss .* is not finite on rank 0 \(its tiles: labelled (.*); unl", last)
    assert found is not None, last
    assert "optimizer.lr" in last
    folder = tmp_path / "runs" / "synthetic-scene" / "wild"
    assert len(complete(folder / "checkpoints")) == int(found[1]) - 1, "the rounds before it were sound"
    assert not (folder / "model.safetensors").exists()
    named = found[2].split(", ")
    dataset = Dataset.open(tiny_dataset)
    index = Index.open(dataset)
    keys = {TileDataset(dataset, labels=False).key(int(row)) for row in index.rows("train")}
    assert len(named) == 4
    assert set(named) <= keys


def test_skipping_says_so_and_ends_when_nothing_is_learnt_any_more(
    tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = {"name": "sgd", "lr": 1e30, "nonfinite": "skip"}
    config = write_config(tmp_path / "skip.yaml", tiny_dataset, optimizer=optimizer, schedule={"rounds": 100})
    with pytest.raises(SystemExit):
        command([str(config)])
    shown = capsys.readouterr()
    assert re.search(r"warning: round \d+: loss .* is not finite on rank 0 .*; the update was skipped", shown.out)
    assert re.search("error: 10[0-4] updates in a row were skipped", shown.err)
    folder = tmp_path / "runs" / "synthetic-scene" / "skip"
    newest = latest(folder / "checkpoints")
    assert newest is not None
    assert read_progress(newest).skipped > 0
    logged = [json.loads(line)["values"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["train/skipped_updates"] == 5, "all of a round"


def test_loader_workers_end_with_a_trainer_that_is_killed(tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "killed.yaml", tiny_dataset, data={"workers": 2}, schedule={"rounds": 1000})
    folder = tmp_path / "runs" / "synthetic-scene" / "killed"
    process = start(["dctc", "train", config], folder / "checkpoints" / "latest")
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(family) > 4, "two workers for each of the streams, and the server that forks them"
    assert not psutil.wait_procs(family, timeout=20)[1]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_a_loader_worker_that_is_killed_ends_the_run(tmp_path: Path, tiny_dataset: Path, processes: int) -> None:
    """As the kernel does it to the largest process when memory runs out: exit code 1 within seconds, on all ranks."""
    config = write_config(tmp_path / "lost.yaml", tiny_dataset, data={"workers": 1}, schedule={"rounds": 1000})
    command = ["dctc", "train", config] if processes == 1 else ["accelerate", *launch_arguments(2), config]
    process = start(command, tmp_path / "runs" / "synthetic-scene" / "lost" / "checkpoints" / "latest")
    family = psutil.Process(process.pid).children(recursive=True)
    next(member for member in family if member.name() == "pt_data_worker").kill()
    assert process.wait(timeout=60) == 1
    assert not psutil.wait_procs(family, timeout=20)[1]


@pytest.mark.matrix
def test_a_run_with_stand_ins_trains_validates_and_draws(
    tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    index = Index.open(Dataset.open(root))
    lost = index.rows("train")[::3]
    for row in lost.tolist():
        shard = root / Dataset.open(root).manifest.shards[int(index.shard[row])].name
        data = bytearray(shard.read_bytes())
        data[int(index.image_offset[row]) + 99] ^= 1
        shard.write_bytes(data)
    config = write_config(
        tmp_path / "damaged.yaml", root, data={"on_damage": "substitute"}, evaluation={"every": 3, "test": True},
        run={"pictures_every": 3},
    )  # fmt: skip
    assert command([str(config)]) == 0
    told = capsys.readouterr().out
    assert "stands in for it from now on" in told
    assert (tmp_path / "runs" / "synthetic-scene" / "damaged" / "report.json").exists()
    strict = write_config(tmp_path / "strict.yaml", root)
    assert command([str(strict)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_evaluating_again_and_again_opens_no_more_files(tiny_dataset: Path) -> None:
    dataset = Dataset.open(tiny_dataset)
    rows = Index.open(dataset).rows("train")

    def opened_after_one_pass() -> int:
        import torch

        normaliser = Normaliser.of(dataset.manifest, torch.device("cpu"))
        assert sum(1 for _ in evaluation_batches(dataset, rows, 4, Layout(), normaliser)) > 1
        return len(list(Path("/proc/self/fd").iterdir()))

    first = opened_after_one_pass()
    assert [opened_after_one_pass() for _ in range(5)] == [first] * 5


def test_without_tracking_nothing_of_mlflow_is_left(tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "quiet.yaml", tiny_dataset, schedule={"rounds": 1})
    assert command([str(config)]) == 0
    assert not list(tmp_path.rglob("mlflow*"))
    assert (tmp_path / "runs" / "synthetic-scene" / "quiet" / "metrics.jsonl").exists()
