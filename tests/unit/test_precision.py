"""The loss scale of fp16, updates that are left out, and activations that are computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dctc.engine.parallel import Parallel
from dctc.engine.precision import LossScale, Precision, UnsupportedPrecision
from dctc.engine.recompute import recompute_blocks
from dctc.engine.update import Losses, OptimizerSpec, Updater
from dctc.methods import Batch, Method
from dctc.methods.base import updates
from tests.golden.rounds import SGD, batches, built

CPU = torch.device("cpu")


def updater(method: Method, spec: OptimizerSpec = SGD, dtype: str = "fp32") -> Updater:
    return Updater(method.parts, spec, Parallel(), Precision(dtype, CPU))


def run_round(method: Method, engine: Updater, labelled: Batch, unlabelled: Batch, step: int = 0) -> list[Losses]:
    return [engine(update) for update in updates(method.round([labelled], [unlabelled], step))]


def state(method: Method, engine: Updater) -> dict[str, Tensor]:
    """Every parameter, buffer and moment."""
    tensors: dict[str, Tensor] = {}
    for name, module in method.parts.items():
        tensors |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
        for key, parameter in module.named_parameters():
            moments: dict[str, Any] = engine.optimizers[name].state.get(parameter, {})
            tensors |= {f"{name}.{key}.{k}": v.clone() for k, v in moments.items() if torch.is_tensor(v)}
    return tensors


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


# ---- the loss scale


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7))
def test_the_scale_moves_as_that_of_torch(finite: list[bool], interval: int) -> None:
    ours = LossScale(interval=interval)
    theirs = torch.amp.GradScaler("cpu", init_scale=ours.value, growth_interval=interval)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    theirs.scale(torch.ones(1))  # makes its scale
    for good in finite:
        optimizer.zero_grad()
        weight.grad = theirs.scale(torch.ones(1)) if good else torch.full((1,), float("inf"))
        theirs.step(optimizer)
        theirs.update()
        ours.update(good)
        assert ours.value == theirs.get_scale()


def test_fp16_sees_the_gradient_of_fp32_in_every_part_of_an_update() -> None:
    """With one unscaled twice, as one GradScaler with two optimizers would, its part's norm were 1,024 times less."""
    norms: dict[str, list[dict[str, float]]] = {}
    for dtype in ("fp32", "fp16"):
        method = built("dctc", norm="group")
        engine = updater(method, OptimizerSpec(name="sgd", lr=1e-6), dtype)
        engine.measure = True
        if (scale := engine.precision.loss_scale) is not None:
            scale.value = 1024.0  # the first one overflows in so small a net
        rounds = run_round(method, engine, *batches(0))
        assert not any(update.skipped for update in rounds)
        norms[dtype] = [{name: float(norm) for name, norm in update.norms.items()} for update in rounds]
    assert [set(update) for update in norms["fp16"]] == [{"teacher"}, *[{"encoder", s} for s in ("s1", "s2") * 2]]
    for lower, full in zip(norms["fp16"], norms["fp32"], strict=True):
        assert lower == pytest.approx(full, rel=0.1)


def test_an_overflow_leaves_everything_as_it_was_and_halves_the_scale() -> None:
    method = built("dctc", norm="group")
    engine = updater(method, dtype="fp16")
    run_round(method, engine, *batches(0))
    scale = engine.precision.loss_scale
    assert scale is not None
    scale.value, scale.since = 2.0**40, 5  # the largest fp16 is 65504
    before = state(method, engine)
    labelled, unlabelled = batches(1)
    losses = engine(next(updates(method.round([labelled], [unlabelled], 1))))
    assert losses.skipped
    assert torch.isfinite(losses.shares).all(), "the loss itself is fine"
    assert (scale.value, scale.since) == (2.0**39, 0)
    assert differing(before, state(method, engine)) == []


def test_bf16_has_no_scale_and_tf32_needs_a_gpu_that_has_it() -> None:
    assert Precision("bf16", CPU).loss_scale is None
    with pytest.raises(UnsupportedPrecision, match="use fp32"):
        Precision("tf32", CPU)


# ---- updates that are not finite


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_skipped_update_leaves_weights_moments_and_buffers_bit_for_bit(norm: str) -> None:
    method = built("dctc", norm=norm)
    engine = updater(method, OptimizerSpec(nonfinite="skip"))
    run_round(method, engine, *batches(0))
    before = state(method, engine)
    labelled, unlabelled = batches(1)
    labelled.images[0, 0, 3, 3] = float("nan")
    unlabelled.images[1, 0, 3, 3] = float("inf")
    losses = run_round(method, engine, labelled, unlabelled, 1)
    assert all(update.skipped for update in losses)
    assert differing(before, state(method, engine)) == []
    assert not any(update.skipped for update in run_round(method, engine, *batches(2), step=2))


def test_skipping_changes_nothing_where_all_is_finite() -> None:
    states = []
    for nonfinite in ("stop", "skip"):
        method = built("dctc")
        engine = updater(method, OptimizerSpec(nonfinite=nonfinite))
        run_round(method, engine, *batches(0))
        states.append(state(method, engine))
    assert differing(*states) == []


def test_ruined_weights_are_seen_whatever_the_losses() -> None:
    method = built("dctc", norm="batch")
    engine = updater(method)
    assert all(part.is_finite() for part in engine.parts.values())
    next(iter(method.parts["s1"].parameters())).data.view(-1)[0] = float("inf")
    next(b for b in method.parts["teacher"].buffers() if b.is_floating_point())[0] = float("nan")
    assert [name for name, part in engine.parts.items() if not part.is_finite()] == ["teacher", "s1"]


# ---- activation checkpointing


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_recomputing_gives_the_same_bits_and_moves_the_statistics_once(norm: str) -> None:
    states = []
    for recompute in (False, True):
        method = built("dctc", norm=norm)
        keys = {name: list(module.state_dict()) for name, module in method.parts.items()}
        if recompute:
            assert [recompute_blocks(module) for module in method.parts.values()] == [9, 5, 4, 4]
        assert {name: list(module.state_dict()) for name, module in method.parts.items()} == keys
        engine = updater(method)
        for step in range(2):
            run_round(method, engine, *batches(step), step=step)
        states.append(state(method, engine))
    assert differing(*states) == []


def test_recomputing_keeps_fewer_activations() -> None:
    kept = []
    for recompute in (False, True):
        method = built("supervised", norm="group")
        network = method.parts["network"]
        if recompute:
            recompute_blocks(network)
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(torch.randn(2, 3, 32, 32))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]
