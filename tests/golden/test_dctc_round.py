"""Losses of whole rounds against the plain loop beside this file, and what makes an update exact.

Networks are float64 here, so that what differs is the arithmetic of the losses: in float32 Adam turns the last bit of
a gradient near zero into a whole step, and batch norm over few pixels carries it on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dctc.engine.update import OptimizerSpec, Updater
from dctc.methods import Method
from dctc.methods.base import Length, updates
from dctc.networks.channel_attention import ChannelAttention
from tests.golden.plain_loop import PlainLoop, Switches
from tests.golden.rounds import ADAM, IGNORE, SGD, TERMS, batches, built, by_term, cut, run_round, updater, weights

EXACT = torch.float64
TILE = 32  # two samples of 2 x 2 pixels at the bottom: enough for batch norm to be well-conditioned

History = list[dict[str, float]]


def engine_losses(method: Method, run: Updater, rounds: int) -> History:
    history = []
    for step in range(rounds):
        labelled, unlabelled = batches(step, tile=TILE, dtype=EXACT)
        history.append(by_term(run_round(method, run, [labelled], [unlabelled], step)))
    return history


def plain_losses(parts: Mapping[str, nn.Module], switches: Switches, rounds: int) -> History:
    loop = PlainLoop(parts, switches)
    return [loop.round(*batches(step, tile=TILE, dtype=EXACT), step) for step in range(rounds)]


def assert_same(got: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    assert len(got) == len(expected)
    for step, (ours, plain) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == plain.keys(), f"round {step}"
        for term, value in plain.items():
            assert math.isclose(ours[term], value, rel_tol=1e-5), f"round {step}, {term}: {ours[term]} for {value}"


# ---- the golden losses


def test_twenty_rounds_of_the_paper_preset() -> None:
    method = built(dtype=EXACT)
    expected = plain_losses(method.parts, Switches(), 20)
    got = engine_losses(method, updater(method, ADAM), 20)
    assert all(tuple(values) == TERMS for values in got)
    assert_same(got, expected)
    assert got[-1]["teacher"] < 0.95 * got[0]["teacher"]  # it learns


SWITCHES: list[tuple[str, dict[str, Any], Switches]] = [
    ("sharpen none", {"sharpen": "none"}, Switches(sharpen="none")),
    ("sharpen s1", {"sharpen": "s1"}, Switches(sharpen="s1")),
    ("sharpen s2", {"sharpen": "s2"}, Switches(sharpen="s2")),
    ("temperature", {"temperature": 0.25}, Switches(temperature=0.25)),
    ("no attention", {"attention": False}, Switches()),
    ("binary", {"loss": "binary"}, Switches(loss="binary")),
    ("soft", {"pseudo_label": "soft"}, Switches(soft=True)),
    ("soft binary", {"pseudo_label": "soft", "loss": "binary"}, Switches(soft=True, loss="binary")),
    ("fused", {"update": "fused"}, Switches(fused=True)),
    ("epochs", {"round": "epoch"}, Switches(epoch=2)),
    ("labels", {"labels_for_students": True}, Switches(labels=True)),
    ("labels fused", {"labels_for_students": True, "update": "fused"}, Switches(labels=True, fused=True)),
    ("starts", {"phase2_start": 1, "phase3_start": 2}, Switches(start=(1, 2))),
    ("ramps", {"phase2_ramp": 3, "phase3_start": 1, "phase3_ramp": 2}, Switches(start=(0, 1), ramp=(3, 2))),
]


@pytest.mark.parametrize(("options", "switches"), [case[1:] for case in SWITCHES], ids=[case[0] for case in SWITCHES])
def test_every_switch(options: dict[str, Any], switches: Switches) -> None:
    method = built(dtype=EXACT, **options)
    method.length = Length(8, 2)
    rounds = 8 if switches.epoch else 4  # the phases come again after three epochs
    expected = plain_losses(method.parts, switches, rounds)
    assert_same(engine_losses(method, updater(method, ADAM), rounds), expected)


@pytest.mark.parametrize(
    ("network", "options", "switches"),
    [
        ("attention_unet", {}, Switches(sgd=True)),
        ("u2net_small", {}, Switches(sgd=True)),
        ("u2net_small", {"labels_for_students": True}, Switches(sgd=True, labels=True)),
    ],
    ids=["attention_unet", "u2net_small", "u2net_small-labels"],
)
def test_every_network(network: str, options: dict[str, Any], switches: Switches) -> None:
    """A U2-Net's loss is the sum of seven, its label that of the fused one."""
    method = built(norm="group", dtype=EXACT, network=network, **options)
    expected = plain_losses(method.parts, switches, 3)
    assert_same(engine_losses(method, updater(method, SGD), 3), expected)


@pytest.mark.parametrize(
    ("options", "switches"),
    [
        ({}, Switches(sgd=True)),
        ({"update": "fused"}, Switches(sgd=True, fused=True)),
        ({"phase2_ramp": 3, "phase3_start": 1, "phase3_ramp": 2}, Switches(sgd=True, start=(0, 1), ramp=(3, 2))),
    ],
    ids=["plain", "fused", "ramps"],
)
def test_sgd_shows_the_scale_of_every_gradient(options: dict[str, Any], switches: Switches) -> None:
    """Adam would hide a factor on a loss."""
    method = built(dtype=EXACT, **options)
    expected = plain_losses(method.parts, switches, 4)
    assert_same(engine_losses(method, updater(method, SGD), 4), expected)


@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_clipping_by_the_norm_of_each_part(clip: float) -> None:
    method = built(dtype=EXACT)
    expected = plain_losses(method.parts, Switches(sgd=True, clip=clip), 4)
    assert_same(engine_losses(method, updater(method, replace(SGD, clip=clip)), 4), expected)


@pytest.mark.parametrize("options", [{}, {"loss": "binary"}, {"attention": True}], ids=str)
def test_supervised(options: dict[str, Any]) -> None:
    method = built("supervised", dtype=EXACT, **options)
    assert not method.uses_unlabelled
    never = Switches(loss=options.get("loss", "multiclass"), start=(99, 99))
    expected = [{"supervised": v["teacher"]} for v in plain_losses({"teacher": method.parts["network"]}, never, 6)]
    assert_same(engine_losses(method, updater(method, ADAM), 6), expected)


def test_the_attention_switch_removes_the_modules() -> None:
    def attentions(method: Method, part: str) -> int:
        return sum(isinstance(module, ChannelAttention) for module in method.parts[part].modules())

    assert [attentions(built(), part) for part in ("teacher", "encoder", "s1", "s2")] == [5, 0, 0, 0]
    assert attentions(built(attention=False), "teacher") == 0
    assert attentions(built("supervised"), "network") == 0
    assert attentions(built("supervised", attention=True), "network") == 5


# ---- one exact update


@pytest.mark.parametrize("spec", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize(
    "options", [{}, {"pseudo_label": "soft", "loss": "binary"}, {"update": "fused"}], ids=["paper", "soft", "fused"]
)
def test_two_micro_batches_equal_one_batch(spec: OptimizerSpec, options: dict[str, Any]) -> None:
    """The mean is over the pixels of the whole batch, so that a micro-batch of few counted pixels weighs little."""
    histories, ends = [], []
    for parts in (1, 2):
        method = built(norm="group", dtype=EXACT, **options)
        run = updater(method, spec)
        history = []
        for step in range(4):
            labelled, unlabelled = batches(step, count=4, dtype=EXACT)
            labelled.required_labels()[2:, :, 3:] = IGNORE  # the second half counts a fifth of the first
            unlabelled.valid[:2, 2:] = False
            history.append(by_term(run_round(method, run, cut(labelled, parts), cut(unlabelled, parts), step)))
        histories.append(history)
        ends.append(weights(method))
    assert_same(histories[1], histories[0])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


def test_a_micro_batch_without_a_counted_pixel_counts_nothing() -> None:
    ends = []
    for parts in (1, 2):
        method = built("supervised", norm="group", dtype=EXACT)
        run = updater(method, SGD)
        labelled, _ = batches(0, count=4, dtype=EXACT)
        labelled.required_labels()[2:] = IGNORE
        pieces = cut(labelled, 2)
        run_round(method, run, pieces if parts == 2 else pieces[:1], [], 0)
        ends.append(weights(method))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_batch_without_a_counted_pixel_has_loss_zero_and_no_gradient(micro: int) -> None:
    method = built(norm="group")
    run = updater(method, ADAM)
    labelled, unlabelled = batches(0)
    labelled.required_labels().fill_(IGNORE)
    unlabelled.valid.fill_(False)
    before = weights(method)
    losses = run_round(method, run, cut(labelled, micro), cut(unlabelled, micro), 0)
    assert by_term(losses) == dict.fromkeys(TERMS, 0.0)
    assert torch.equal(weights(method), before)


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_clipping_bounds_the_step_of_each_part() -> None:
    method = built()
    run = updater(method, replace(SGD, momentum=0.0, lr=1.0, clip=1e-3))
    labelled, unlabelled = batches(0, tile=TILE)
    for update in updates(method.round([labelled], [unlabelled], 0)):
        before = {name: vector(method.parts[name]) for name in update.parts}
        run(update)
        for name, old in before.items():
            step = float((vector(method.parts[name]) - old).norm())
            assert math.isclose(step, 1e-3, rel_tol=1e-2), (update.terms, name)


def test_the_rate_is_set_in_every_group() -> None:
    method = built()
    run = updater(method, SGD)
    assert run.set_rate(0.0) == 0
    before = weights(method)
    labelled, unlabelled = batches(0)
    run_round(method, run, [labelled], [unlabelled], 0)
    assert torch.equal(weights(method), before)
    assert math.isclose(run.set_rate(0.25), 0.0025)
    assert {group["lr"] for optimizer in run.optimizers.values() for group in optimizer.param_groups} == {0.01 * 0.25}


def test_bf16_stays_near_fp32_and_keeps_float32_weights() -> None:
    last = {}
    for precision in ("fp32", "bf16"):
        method = built(norm="group")
        run = updater(method, ADAM, precision)
        for step in range(2):
            labelled, unlabelled = batches(step)
            last[precision] = by_term(run_round(method, run, [labelled], [unlabelled], step))
        assert weights(method).dtype == torch.float32
    for term, value in last["fp32"].items():
        assert math.isclose(last["bf16"][term], value, rel_tol=0.1), term
