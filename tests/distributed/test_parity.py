"""Two real processes compute what one computes on the same global batch (training.md, "One wrap and one optimizer")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import launch, losses, write_config

ADAM: dict[str, Any] = {"name": "adam", "lr": 1e-3}
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.01}


def train(folder: Path, dataset: Path, processes: int, name: str, *overrides: str, **sections: Any) -> Path:
    config = write_config(folder / f"{name}.yaml", dataset, **sections)
    launch(processes, config, *overrides)
    return folder / "runs" / "synthetic-scene" / name


def assert_equal_runs(one: Path, two: Path, tolerance: float, elementwise: bool = True) -> None:
    """Losses of every round and the weights of every part, as vectors and, but for Adam, in every element.

    Adam steps a whole learning rate (1e-3) where a gradient is rounding noise around zero, so single elements may
    differ by more than the part as a whole.
    """
    first, second = losses(one), losses(two)
    assert len(first) == len(second) == 6
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=tolerance), key
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == others.keys()
    for part in {key.partition(".")[0] for key in weights}:
        first_part, second_part = (
            torch.cat([tensor.flatten() for key, tensor in sorted(w.items()) if key.startswith(f"{part}.")])
            for w in (weights, others)
        )
        assert (first_part - second_part).norm() <= tolerance * first_part.norm(), part
        if elementwise:
            assert (first_part - second_part).abs().max() <= tolerance * first_part.abs().max(), part


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
def test_two_processes_equal_one(tmp_path: Path, tiny_dataset: Path, optimizer: dict[str, Any]) -> None:
    # SGD must be here: Adam hides a wrong scale of the gradient.
    one = train(tmp_path, tiny_dataset, 1, "one", optimizer=optimizer)
    two = train(tmp_path, tiny_dataset, 2, "two", optimizer=optimizer)
    assert_equal_runs(one, two, 1e-5, elementwise=optimizer is SGD)


def test_accumulation_and_clipping_over_two_processes_equal_one(tmp_path: Path, tiny_dataset: Path) -> None:
    optimizer = SGD | {"clip": 0.5}
    one = train(tmp_path, tiny_dataset, 1, "one", optimizer=optimizer)
    two = train(tmp_path, tiny_dataset, 2, "two", optimizer=optimizer, parallel={"accumulation": 2})
    assert_equal_runs(one, two, 1e-5)


def test_supervised_on_two_processes(tmp_path: Path, tiny_dataset: Path) -> None:
    one = train(tmp_path, tiny_dataset, 1, "one", method="supervised", optimizer=SGD)
    two = train(tmp_path, tiny_dataset, 2, "two", method="supervised", optimizer=SGD)
    assert_equal_runs(one, two, 1e-5)


def test_batch_norm_buffers_are_the_same_on_both_ranks(tmp_path: Path, tiny_dataset: Path) -> None:
    """The final test is reduced over ranks; a second, single process on the saved model must find the same score."""
    run = train(
        tmp_path, tiny_dataset, 2, "pair", network={"norm": "batch"}, evaluation={"test": True, "batch": 3}
    )  # fmt: skip
    from dctc.bundle import Bundle
    from dctc.evaluation.model import evaluate_model
    from shards.manifest import Dataset

    evaluation = evaluate_model(Bundle.load(run / "model.safetensors"), Dataset.open(tiny_dataset))
    import json

    test = json.loads((run / "report.json").read_text())["test"]
    for name, net in evaluation.nets.items():
        assert net.scores is not None
        found = torch.tensor(test["nets"][name]["scores"]["matrix"])
        assert torch.equal(found, torch.from_numpy(net.scores.matrix.copy()))


def test_a_strategy_that_did_not_come_up_is_an_error(tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "wrong.yaml", tiny_dataset)
    done = launch(1, config, "parallel.strategy=ddp", check=False)
    assert done.returncode != 0
    assert "parallel.strategy is ddp, but 1 process" in done.stderr
