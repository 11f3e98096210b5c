"""Which bits move: each update touches its own parts, and labelling in between leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dctc.engine.update import Losses, OptimizerSpec, Updater
from dctc.methods import Method, Update
from tests.golden.rounds import ADAM, SGD, TERMS, batches, built, cut, run_round, updater

MOVED = [{"teacher"}, {"encoder", "s1"}, {"encoder", "s2"}, {"encoder", "s1"}, {"encoder", "s2"}]

State = dict[str, dict[str, Tensor]]


def snapshot(method: Method, run: Updater) -> State:
    """Every parameter, buffer and optimizer tensor of every part, copied."""
    state: State = {}
    for name, module in method.parts.items():
        tensors = {f"model.{key}": value for key, value in module.state_dict().items()}
        for key, parameter in module.named_parameters():
            for kind, value in run.optimizers[name].state.get(parameter, {}).items():
                if torch.is_tensor(value):
                    tensors[f"{kind}.{key}"] = value
        state[name] = {key: value.detach().clone() for key, value in tensors.items()}
    return state


def moved(before: State, after: State) -> set[str]:
    """Parts of which at least one bit is another, or one tensor new."""
    return {
        name
        for name, tensors in after.items()
        if tensors.keys() != before[name].keys() or not all(torch.equal(t, before[name][k]) for k, t in tensors.items())
    }


class Witness:
    """Runs updates and notes which parts moved in each, and between it and the one before."""

    def __init__(self, method: Method, run: Updater) -> None:
        self.method, self.run = method, run
        self.last = snapshot(method, run)
        self.terms: list[tuple[str, ...]] = []
        self.inside: list[set[str]] = []
        self.between: list[set[str]] = []
        self.modes: list[bool] = []

    def __call__(self, update: Update) -> Losses:
        self.modes += [module.training for part in self.method.parts.values() for module in part.modules()]
        before = snapshot(self.method, self.run)
        losses = self.run(update)
        after = snapshot(self.method, self.run)
        self.terms.append(update.terms)
        self.between.append(moved(self.last, before))
        self.inside.append(moved(before, after))
        self.last = after
        return losses


def witnessed(method: Method, run: Updater, step: int, micro: int = 1) -> Witness:
    """One round."""
    witness = Witness(method, run)
    labelled, unlabelled = batches(step, count=2 * micro)
    run_round(method, witness, cut(labelled, micro), cut(unlabelled, micro), step)
    assert moved(witness.last, snapshot(method, run)) == set()  # nothing after the last update
    return witness


def test_the_snapshot_holds_all_that_a_part_has() -> None:
    method = built()
    run = updater(method, ADAM)
    witnessed(method, run, 0)
    for tensors in snapshot(method, run).values():
        assert {key.rsplit(".", 1)[-1] for key in tensors} >= {"running_mean", "running_var", "num_batches_tracked"}
        assert {key.split(".")[0] for key in tensors} == {"model", "step", "exp_avg", "exp_avg_sq"}
    for optimizer, module in ((run.optimizers[name], method.parts[name]) for name in method.parts):
        assert {id(p) for p in optimizer.state} == {id(p) for p in module.parameters()}


ADAMW = OptimizerSpec(name="adamw", weight_decay=0.01)


@pytest.mark.parametrize(
    ("spec", "norm", "micro", "network"),
    [
        pytest.param(ADAM, "batch", 1, "unet", id="adam-batch"),
        pytest.param(ADAM, "group", 1, "unet", id="adam-group"),
        pytest.param(ADAM, "batch", 2, "unet", id="adam-batch-accumulated"),
        pytest.param(ADAMW, "batch", 1, "unet", id="adamw-batch"),
        pytest.param(SGD, "batch", 1, "unet", id="sgd-batch"),
        pytest.param(SGD, "group", 2, "unet", id="sgd-group-accumulated"),
        pytest.param(ADAM, "batch", 1, "attention_unet", id="attention_unet"),
        pytest.param(ADAM, "batch", 1, "u2net_small", id="u2net_small"),
    ],
)
def test_each_update_moves_its_own_parts_and_no_other_bit(
    spec: OptimizerSpec, norm: str, micro: int, network: str
) -> None:
    method = built(norm=norm, network=network)
    run = updater(method, spec)
    for step in range(3):  # from the second round on every part has moments, which would move an idle one
        witness = witnessed(method, run, step, micro)
        assert witness.terms == [(term,) for term in TERMS]
        assert witness.inside == MOVED
        assert witness.between == [set()] * 5  # labelling is without a trace, batch-norm buffers included
        assert all(witness.modes)  # ... and leaves every layer in training mode


def test_fused_updates_move_both_students_and_never_the_teacher() -> None:
    method = built(update="fused")
    run = updater(method, ADAM)
    for step in range(2):
        witness = witnessed(method, run, step)
        assert witness.terms == [TERMS[:1], TERMS[1:3], TERMS[3:]]
        assert witness.inside == [{"teacher"}, {"encoder", "s1", "s2"}, {"encoder", "s1", "s2"}]
        assert witness.between == [set()] * 3


def test_a_phase_that_has_not_started_leaves_the_students_untouched() -> None:
    method = built(phase2_start=1, phase3_start=2)
    run = updater(method, ADAM)
    for step, expected in enumerate((MOVED[:1], MOVED[:3], MOVED)):
        assert witnessed(method, run, step).inside == expected


def test_every_batch_norm_counts_the_updates_of_its_own_part() -> None:
    method = built()
    run = updater(method, ADAM)
    for step in range(3):
        witnessed(method, run, step)
    for name, updates in {"teacher": 1, "encoder": 4, "s1": 2, "s2": 2}.items():
        tracked = {int(v) for k, v in method.parts[name].state_dict().items() if k.endswith("num_batches_tracked")}
        assert tracked == {3 * updates}, name


def test_supervised_moves_its_network() -> None:
    method = built("supervised")
    run = updater(method, ADAM)
    witness = witnessed(method, run, 0)
    assert witness.terms == [("supervised",)]
    assert witness.inside == [{"network"}]
