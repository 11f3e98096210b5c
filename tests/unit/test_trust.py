"""Trusted pseudo labels, class weights and dropped channels: formulas in numpy, and the same on any layout."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dctc.methods.base import Total
from dctc.methods.trust import HEAVIEST, Trust, class_weights, drop_channels, rounds_of, weights_of

IGNORE, CLASSES = 255, 4


def answered(steps: Generator[Total, Any, Any], others: Tensor | None = None) -> Any:
    """What the steps return in one process, or where the other ranks' counts are ``others``."""
    try:
        step = next(steps)
        while True:
            step = steps.send(step.own if others is None else step.own + others)
    except StopIteration as end:
        return end.value


def drawn(seed: int, count: int = 4, size: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, CLASSES, size, size, generator=generator, dtype=torch.float64) * 2
    return logits, torch.rand(count, size, size, generator=generator) > 0.2


TRUSTS = [
    Trust(),
    Trust("fixed", 0.6),
    Trust("adaptive"),
    Trust("entropy", drop=0.3),
    Trust("entropy", drop=0.3, soft=True),
]


@pytest.mark.parametrize("trust", TRUSTS, ids=str)
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_change_nothing(trust: Trust, parts: int) -> None:
    logits, valid = drawn(1)
    memories: list[dict[str, Any]] = [{"means": {"s1": [0.3, 0.2, 0.25, 0.25, 0.7]}} for _ in range(2)]
    whole = answered(trust.labels("s1", [logits], [valid], memories[0], 0.5))
    pieces = answered(trust.labels("s1", logits.chunk(parts), valid.chunk(parts), memories[1], 0.5))
    assert torch.equal(torch.cat(pieces), whole[0])
    assert memories[0]["means"]["s1"] == pytest.approx(memories[1]["means"]["s1"], rel=1e-12)
    if trust.kind != "none":
        counted = whole[0].sum(1) > 0 if trust.soft else whole[0] != IGNORE
        assert 0.1 * valid.sum() < counted.sum() < valid.sum(), "some are trusted and some are not"
        assert not counted[~valid].any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), drop=st.floats(0, 1), done=st.floats(0, 1))
def test_at_most_the_share_of_the_most_uncertain_is_dropped(seed: int, drop: float, done: float) -> None:
    logits, valid = drawn(seed)
    (y,) = answered(Trust("entropy", drop=drop).labels("s1", [logits], [valid], {}, done))
    kept = (y != IGNORE) & valid
    assert kept.sum() >= (1 - drop * (1 - done)) * valid.sum() - 1e-6
    p = torch.softmax(logits, 1)
    entropy = -(p * p.log()).sum(1)
    if kept.any() and (valid & ~kept).any():
        assert entropy[kept].max() <= entropy[valid & ~kept].min() + 1e-3, "the uncertain ones went"


def test_running_means_of_the_adaptive_threshold() -> None:
    logits, valid = drawn(2)
    memory: dict[str, Any] = {}
    trust = Trust("adaptive")
    p = torch.softmax(logits, 1).numpy()
    seen = valid.numpy()
    now = np.array([*(p[:, k][seen].mean() for k in range(CLASSES)), p.max(1)[seen].mean()])
    expected = np.full(CLASSES + 1, 0.25)
    for _ in range(3):
        answered(trust.labels("s1", [logits], [valid], memory, 0.0))
        expected = 0.99 * expected + 0.01 * now
    np.testing.assert_allclose(memory["means"]["s1"], expected, rtol=1e-12)
    answered(trust.labels("teacher", [logits], [valid], memory, 0.0))
    assert set(memory["means"]) == {"s1", "teacher"}, "each net has its own"


def test_rare_classes_need_less_confidence() -> None:
    logits = torch.zeros(1, CLASSES, 1, 2, dtype=torch.float64)
    logits[0, 0, 0, 0] = logits[0, 3, 0, 1] = 1.2  # one pixel of class 0, one of class 3, as sure as each other
    memory = {"means": {"s1": [0.6, 0.2, 0.1, 0.1, 0.9]}}
    (y,) = answered(Trust("adaptive").labels("s1", [logits], [torch.ones(1, 1, 2, dtype=torch.bool)], memory, 0.0))
    assert y.tolist() == [[[IGNORE, 3]]]


def test_no_pixel_with_data_leaves_the_means() -> None:
    logits, valid = drawn(3)
    memory = {"means": {"s1": [0.25] * 5}}
    answered(Trust("adaptive").labels("s1", [logits], [torch.zeros_like(valid)], memory, 0.0))
    assert memory["means"]["s1"] == [0.25] * 5


def test_a_round_that_overflowed_leaves_the_means() -> None:
    logits, valid = drawn(3)
    logits[0, 0, 0, 0], valid[0, 0, 0] = torch.nan, True
    memory = {"means": {"s1": [0.25] * 5}}
    answered(Trust("adaptive").labels("s1", [logits], [valid], memory, 0.0))
    assert memory["means"]["s1"] == [0.25] * 5


@settings(max_examples=50, deadline=None)
@given(pixels=st.lists(st.integers(0, 10**9), min_size=2, max_size=15), power=st.floats(0.05, 1))
def test_class_weights(pixels: list[int], power: float) -> None:
    weights = np.array(weights_of(pixels, power))
    assert (weights > 0).all()
    assert (weights <= HEAVIEST).all()
    if total := sum(pixels):
        shares = np.array(pixels) / total
        assert (weights * shares).sum() <= 1 + 1e-9, "the mean over the pixels is 1 where no weight is cut"
        order = np.argsort(pixels)
        assert (np.diff(weights[order]) <= 1e-12).all(), "rarer is heavier"
        if (weights < HEAVIEST).all() and all(pixels):
            assert (weights * shares).sum() == pytest.approx(1)
            assert weights[0] / weights[-1] == pytest.approx((pixels[-1] / pixels[0]) ** power)


def test_class_weights_count_all_rounds_and_ranks() -> None:
    labels = torch.tensor([[[0, 0, 1, IGNORE]], [[0, 0, 0, 2]]])
    memory: dict[str, Any] = {}
    first = answered(class_weights([labels], 3, 0.5, memory))
    assert memory["pixels"] == [5, 1, 1]
    assert first.tolist() == pytest.approx(weights_of([5, 1, 1], 0.5), rel=1e-6)
    answered(class_weights(list(labels.chunk(2)), 3, 0.5, memory), others=torch.tensor([1, 2, 3]))
    assert memory["pixels"] == [11, 4, 5]
    assert answered(class_weights([torch.full_like(labels, IGNORE)], 3, 0.5, {})).tolist() == [1, 1, 1]


def test_channels_are_dropped_by_the_sample_alone() -> None:
    features = [torch.ones(4, 64, 8, 8), torch.ones(4, 128, 4, 4)]
    keys = [3, 2**62, 17, 3]
    first, second = drop_channels(features, keys, 0.25)
    assert first.shape == features[0].shape
    for dropped in (first, second):
        assert sorted(set(dropped.flatten().tolist())) == [0.0, pytest.approx(4 / 3)]
        assert (dropped.amax((2, 3)) == dropped.amin((2, 3))).all(), "whole channels"
        assert torch.equal(dropped[0], dropped[3])
        assert not torch.equal(dropped[0], dropped[1])
    alone = drop_channels([f[1:3] for f in features], keys[1:3], 0.25)
    assert torch.equal(alone[0], first[1:3])
    share = float((torch.cat([first.mean((2, 3)), second.mean((2, 3))], 1) == 0).float().mean())
    assert abs(share - 0.25) < 0.06


def test_rounds_below_one_are_a_share_of_the_run() -> None:
    assert [rounds_of(v, 1500) for v in (0, 0.1, 0.5, 1, 40.0)] == [0, 150, 750, 1, 40]
