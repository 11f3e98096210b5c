"""Twenty rounds of the comparison methods against loops in plain PyTorch, written here from the methods' formulas.

As in the golden rounds of dctc the networks are float64, and nothing of the engine or of the losses is borrowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dctc.methods import Batch, Method
from dctc.methods.base import Length
from dctc.methods.cps import Options as CPSOptions
from dctc.methods.dst_cbc import BINS, DSTCBC, thresholds
from tests.golden.rounds import (
    ADAM,
    CLASSES,
    IGNORE,
    balanced,
    batches,
    built,
    by_term,
    cut,
    run_round,
    updater,
    weights,
)

EXACT = torch.float64
ROUNDS = 20
TILE = 32
History = list[dict[str, float]]


def views_of(batch: Batch, seed: int) -> Batch:
    """Two views: the image with noise, a few more pixels missing in each."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *batch.images.shape, generator=generator, dtype=EXACT) * 0.3
    seen = [batch.valid & (torch.rand(batch.valid.shape, generator=generator) > 0.1) for _ in range(2)]
    views = [torch.where(mask[:, None], batch.images + extra, 0.0) for mask, extra in zip(seen, noise, strict=True)]
    return replace(batch, views=views, view_valid=seen)


def boxed(batch: Batch, seed: int) -> Batch:
    """One box a sample; the partner is the other one of two."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.zeros(1, *batch.valid.shape, dtype=torch.bool)
    for sample in range(len(batch.images)):
        top, left = torch.randint(0, TILE // 2, (2,), generator=generator).tolist()
        boxes[0, sample, top : top + TILE // 2, left : left + TILE // 3] = True
    return replace(batch, boxes=boxes, partner=torch.arange(len(batch.images)) ^ 1)


def data(step: int) -> tuple[Batch, Batch]:
    labelled, unlabelled = batches(step, tile=TILE, dtype=EXACT)
    return views_of(labelled, 2 * step), boxed(views_of(unlabelled, 2 * step + 1), step)


EVERYTHING = [data(100 + number)[1] for number in range(3)]  # the unlabelled set of a survey


def engine_losses(method: Method) -> History:
    method.length = Length(ROUNDS, 5)
    run = updater(method, ADAM)
    history = []
    for step in range(ROUNDS):
        labelled, unlabelled = data(step)
        history.append(by_term(run_round(method, run, [labelled], [unlabelled], step, EVERYTHING)))
    return history


def pixels(logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y of each pixel, 0 where ignored."""
    p = torch.softmax(logits, 1)
    chosen = (p * nn.functional.one_hot(y.where(y != IGNORE, 0), CLASSES).movedim(-1, 1)).sum(1)
    return -chosen.log() * (y != IGNORE)


def cross_entropy(logits: Tensor, y: Tensor, weight_of: Tensor) -> Tensor:
    return (pixels(logits, y) * by_class(weight_of, y)).sum() / (y != IGNORE).sum()


def by_class(weight_of: Tensor, y: Tensor) -> Tensor:
    return weight_of[y.where(y != IGNORE, 0)]


class Balance:
    """Weights of the classes by the labels that it has been shown so far."""

    def __init__(self, power: float) -> None:
        self.power = power
        self.counts = np.zeros(CLASSES)

    def after(self, y: Tensor) -> Tensor:
        self.counts += np.bincount(y[y != IGNORE].numpy(), minlength=CLASSES)
        return torch.from_numpy(balanced(self.counts, self.power))


def adam(*modules: nn.Module) -> list[torch.optim.Adam]:
    return [torch.optim.Adam(module.parameters(), lr=1e-3) for module in modules]


def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities in evaluation mode; the net is back in training mode afterwards."""
    net.eval()
    with torch.no_grad():
        p = torch.softmax(net(images), 1)
    net.train()
    return p


def step_all(loss: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    for optimizer in optimizers:
        optimizer.step()


# ---- the loops


def mean_teacher_loop(parts: Mapping[str, nn.Module], power: float = 0.0) -> History:
    balance = Balance(power)
    student = deepcopy(parts["s1"]).train()
    average = deepcopy(student)
    optimizers = adam(student)
    history = []
    for step in range(ROUNDS):
        labelled, unlabelled = data(step)
        t = min(1.0, step / 8)  # 0.4 * 20 rounds
        w = 10 * math.exp(-5 * (1 - t) ** 2)
        y = labelled.required_labels().where(labelled.view_valid[0], IGNORE)
        z = student(torch.cat([labelled.views[0], unlabelled.views[0]]))  # batch norm sees both
        supervised = cross_entropy(z[:2], y, balance.after(y))
        apart, count = torch.zeros((), dtype=EXACT), 0
        for logits, batch in ((z[:2], labelled), (z[2:], unlabelled)):
            both = batch.view_valid[0] & batch.view_valid[1]
            squares = (torch.softmax(logits, 1) - predict(average, batch.views[1])) ** 2
            apart = apart + (squares.sum(1) / CLASSES * both).sum()
            count += int(both.sum())
        step_all(supervised + w * apart / count, optimizers)
        alpha = min(1 - 1 / (step + 1), 0.99)
        with torch.no_grad():
            for own, leader in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
                own.copy_(alpha * own + (1 - alpha) * leader if own.is_floating_point() else leader)
        history.append({"supervised": supervised.item(), "consistency": (w * apart / count).item()})
    return history


def hard(p: Tensor, valid: Tensor) -> Tensor:
    return p.argmax(1).where(valid, IGNORE)


def cps_loop(parts: Mapping[str, nn.Module], cutmix: bool, power: float = 0.0) -> History:
    balance = Balance(power)
    nets = [deepcopy(parts[name]).train() for name in ("s1", "s2")]
    optimizers = adam(*nets)
    weight = 1.0 if cutmix else 1.5
    history = []
    for step in range(ROUNDS):
        labelled, unlabelled = data(step)
        y = labelled.required_labels()
        if cutmix:
            assert unlabelled.boxes is not None
            inside = unlabelled.boxes[0]
            swapped = unlabelled.images.flip(0)  # of two samples the other one
            mixed = torch.where(inside[:, None], swapped, unlabelled.images)
            said = [hard(predict(net, unlabelled.images), unlabelled.valid) for net in nets]
            labels = [torch.where(inside, s.flip(0), s) for s in said]
            everything = [net(torch.cat([labelled.images, mixed])) for net in nets]
            logits = [z[2:] for z in everything]
        else:
            everything = [net(torch.cat([labelled.images, unlabelled.images])) for net in nets]
            logits = everything
            valid = torch.cat([labelled.valid, unlabelled.valid])
            labels = [hard(z.detach(), valid) for z in logits]
        weight_of = balance.after(y)
        supervised = [cross_entropy(z[:2], y, weight_of) for z in everything]
        pairs = ((logits[0], labels[1]), (logits[1], labels[0]))
        cross = [weight * cross_entropy(z, said, weight_of) for z, said in pairs]
        step_all(sum([*supervised, *cross], torch.zeros(())), optimizers)
        values = [loss.item() for loss in (*supervised, *cross)]
        history.append(dict(zip(("s1", "s2", "s2_to_s1", "s1_to_s2"), values, strict=True)))
    return history


def turned(net: nn.Module, images: Tensor, turns: Sequence[int]) -> Tensor:
    """The mean over quarter turns of the probabilities, turned back."""
    seen = [predict(net, images.rot90(k, (2, 3))).rot90(-k, (2, 3)) for k in turns]
    return torch.stack(seen).mean(0)


def top_share(net: nn.Module, share: float, turns: Sequence[int]) -> list[float]:
    """Of each class the confidence that its most confident ``share`` of pixels have, floored to whole 4096ths."""
    found: list[list[float]] = [[] for _ in range(CLASSES)]
    for batch in EVERYTHING:
        confidence, classes = turned(net, batch.images, turns).max(1)
        for value, label in zip(confidence[batch.valid].tolist(), classes[batch.valid].tolist(), strict=True):
            found[label].append(value)
    ranked = [sorted(values, reverse=True) for values in found]
    return [math.floor(r[math.ceil(share * len(r)) - 1] * 4096) / 4096 if r else 0.0 for r in ranked]


def dst_cbc_loop(
    parts: Mapping[str, nn.Module], restart: bool, power: float = 0.0, turns: Sequence[int] = (0,)
) -> History:
    """A fifth of the rounds is supervised, then come two stages of eight rounds."""
    balance = Balance(power)
    net = deepcopy(parts["s1"]).train()
    labeller, least = deepcopy(net), [0.0] * CLASSES
    optimizers = adam(net)
    history = []
    for step in range(ROUNDS):
        labelled, unlabelled = data(step)
        if step in (4, 12):
            labeller = deepcopy(net)
            least = top_share(labeller, 0.5 if step == 4 else 1.0, turns)
            optimizers = adam(net) if restart else optimizers
        y = labelled.required_labels()
        count = (y != IGNORE).sum()
        weight_of = balance.after(y)
        if step < 4:
            total = (pixels(net(labelled.images), y) * by_class(weight_of, y)).sum()
        else:
            z = net(torch.cat([labelled.images, unlabelled.images]))
            total = (pixels(z[:2], y) * by_class(weight_of, y)).sum()
            confidence, classes = turned(labeller, unlabelled.images, turns).max(1)
            pseudo = classes.where(unlabelled.valid & (confidence >= torch.tensor(least, dtype=EXACT)[classes]), IGNORE)
            ce = pixels(z[2:], pseudo)
            total = total + (torch.exp(-ce.detach()) ** 9 * ce * by_class(weight_of, pseudo)).sum()
            count = count + (pseudo != IGNORE).sum()
        step_all(total / count, optimizers)
        history.append({"supervised" if step < 4 else "self_training": (total / count).item()})
    return history


CASES: list[tuple[str, dict[str, Any], Callable[[Mapping[str, nn.Module]], History]]] = [
    ("mean_teacher", {"cap": 0.99}, mean_teacher_loop),
    ("cps", {}, lambda parts: cps_loop(parts, cutmix=False)),
    ("cps", {"cutmix": True, "weight": 1.0}, lambda parts: cps_loop(parts, cutmix=True)),
    ("dst_cbc", {"stages": 2, "start": 0.2}, lambda parts: dst_cbc_loop(parts, restart=True)),
    ("dst_cbc", {"stages": 2, "start": 0.2, "restart": False}, lambda parts: dst_cbc_loop(parts, restart=False)),
    ("mean_teacher", {"cap": 0.99, "class_balance": 0.5}, lambda parts: mean_teacher_loop(parts, 0.5)),
    ("cps", {"class_balance": 0.5}, lambda parts: cps_loop(parts, False, 0.5)),
    ("cps", {"cutmix": True, "weight": 1.0, "class_balance": 0.5}, lambda parts: cps_loop(parts, True, 0.5)),
    ("dst_cbc", {"stages": 2, "start": 0.2, "label_turns": 4}, lambda parts: dst_cbc_loop(parts, True, turns=range(4))),
    ("dst_cbc", {"stages": 2, "start": 0.2, "class_balance": 0.5}, lambda parts: dst_cbc_loop(parts, True, 0.5)),
]


@pytest.mark.parametrize(("name", "options", "loop"), CASES, ids=[f"{n}-{o}" for n, o, _ in CASES])
def test_twenty_rounds(name: str, options: dict[str, Any], loop: Callable[[Mapping[str, nn.Module]], History]) -> None:
    method = built(name, dtype=EXACT, **options)
    expected = loop(method.parts)
    got = engine_losses(method)
    assert len(got) == len(expected) == ROUNDS
    for step, (ours, plain) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == plain.keys(), f"round {step}"
        for term, value in plain.items():
            assert math.isclose(ours[term], value, rel_tol=1e-5, abs_tol=1e-12), f"round {step}, {term}"


def test_switches_of_the_comparison_methods_make_a_difference() -> None:
    """Or the golden runs would prove nothing of them."""
    runs = [engine_losses(built(name, dtype=EXACT, **options)) for name, options, _ in CASES]
    assert runs[1] != runs[2]
    assert runs[3][:4] == runs[4][:4]
    assert runs[3][5:] != runs[4][5:]
    for plain, weighted in ((0, 5), (1, 6), (2, 7), (3, 9)):
        assert all(a != b for a, b in zip(runs[plain], runs[weighted], strict=True))
    assert runs[3][:4] == runs[8][:4]
    assert runs[3][5:] != runs[8][5:]


# ---- parts of them


@pytest.mark.parametrize("name", ["mean_teacher", "cps", "dst_cbc"])
def test_micro_batches_change_nothing(name: str) -> None:
    """Though an update has terms of both streams. Group norm, because batch norm sees micro-batches."""
    found = []
    for parts in (1, 2):
        method = built(name, norm="group", dtype=EXACT)
        method.length = Length(2, 1)  # round 1 is in a stage of self-training
        run = updater(method, ADAM)
        labelled, unlabelled = data(0)
        losses = run_round(method, run, cut(labelled, parts), cut(unlabelled, parts), 1, EVERYTHING)
        found.append(by_term(losses) | {"weights": float(weights(method).norm())})
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # losses are float32


def test_the_average_starts_as_the_student_and_follows_it() -> None:
    method = built("mean_teacher")
    run = updater(method, ADAM)
    method.length = Length(ROUNDS, 5)
    labelled, unlabelled = (
        replace(batch, images=batch.images.float(), views=[view.float() for view in batch.views]) for batch in data(0)
    )
    for step, equal in ((0, True), (1, False)):  # alpha is 0 in the first round, 1/2 in the second
        run_round(method, run, [labelled], [unlabelled], step)
        student, average = (list(method.parts[name].state_dict().values()) for name in ("s1", "ema"))
        assert all(torch.equal(a, b) for a, b in zip(student, average, strict=True)) == equal


def test_the_labeller_moves_only_when_a_stage_begins() -> None:
    method = built("dst_cbc", dtype=EXACT, stages=2, start=0.2)
    assert isinstance(method, DSTCBC)
    method.length = Length(ROUNDS, 5)
    assert method.first_rounds() == [4, 12]
    run = updater(method, ADAM)
    changes = []
    for step in range(ROUNDS):
        before = deepcopy(method.parts["labeller"].state_dict())
        labelled, unlabelled = data(step)
        run_round(method, run, [labelled], [unlabelled], step, EVERYTHING)
        after = method.parts["labeller"].state_dict()
        if any(not torch.equal(before[key], after[key]) for key in before):
            changes.append(step)
    assert changes == [4, 12]
    assert len(method.memory["thresholds"]) == CLASSES


def test_thresholds_are_the_quantiles_of_each_class() -> None:
    draw = np.random.default_rng(0)
    counts = torch.zeros(3, BINS, dtype=torch.int64)
    values = [draw.beta(5, 1, 1000), draw.uniform(0.3, 1.0, 37)]  # the third class is never predicted
    for label, confidences in enumerate(values):
        counts[label] = torch.from_numpy(np.histogram(confidences, BINS, (0.0, 1.0))[0])
    for share in (0.2, 0.4, 1.0):
        got = thresholds(counts, share)
        for label, confidences in enumerate(values):
            kth = np.sort(confidences)[::-1][math.ceil(share * len(confidences)) - 1]
            assert got[label] == math.floor(kth * BINS) / BINS
            assert (confidences >= got[label]).sum() >= share * len(confidences)
        assert got[2] == 0.0


def test_a_method_without_boxes_cannot_mix() -> None:
    labelled, _ = batches(0)
    with pytest.raises(ValueError, match="declare them in its needs"):
        labelled.mixed(labelled.images)
    with pytest.raises(ValueError, match="weight must be at least 0"):
        CPSOptions(weight=-1.0)
