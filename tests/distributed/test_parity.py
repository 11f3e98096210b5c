"""Two real processes compute what one computes on the same global batch (training.md, "One wrap and one optimizer")."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dctc.bundle import Bundle
from dctc.evaluation.model import evaluate_model
from shards.manifest import Dataset
from tests.tiny import launch, launch_together, losses, write_config

SGD = "optimizer.name=sgd optimizer.lr=0.01"
RUNS = {
    "adam": "optimizer.name=adam optimizer.lr=0.001",
    "sgd": SGD,  # Adam hides a wrong scale of the gradient
    "clipped": f"{SGD} optimizer.clip=0.5",
    "supervised": f"{SGD} method.name=supervised",
}
# The final test is reduced over ranks.
PAIR_ALONE = {"norm": "network.norm=batch evaluation.test=true evaluation.batch=3"}
MORE = {"clipped": "parallel.accumulation=2"}  # for the pair


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """The folder of the runs one-NAME and two-NAME of one and of two processes; each kind in one start."""
    config = write_config(tmp_path_factory.mktemp("parity") / "parity.yaml", tiny_dataset)
    launch_together("none", config, [f"run.name=one-{name} {keys}" for name, keys in RUNS.items()])
    pair = RUNS | PAIR_ALONE
    launch_together("ddp", config, [f"run.name=two-{name} {keys} {MORE.get(name, '')}" for name, keys in pair.items()])
    return config.parent / "runs" / "synthetic-scene"


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


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(trained: Path, name: str) -> None:
    assert_equal_runs(trained / f"one-{name}", trained / f"two-{name}", 1e-5, elementwise=name != "adam")


def test_batch_norm_buffers_are_the_same_on_both_ranks(trained: Path, tiny_dataset: Path) -> None:
    """A second, single process on the model that the pair has saved must find the pair's score."""
    run = trained / "two-norm"
    evaluation = evaluate_model(Bundle.load(run / "model.safetensors"), Dataset.open(tiny_dataset))
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
