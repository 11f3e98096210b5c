"""Losses against equations 5 and 6 worked out in numpy float64: values, gradients, ignored pixels, extreme logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shards.manifest
from dctc.methods import base
from dctc.methods.losses import (
    cross_entropy_sum,
    log1mexp,
    pixel_count,
    pseudo_label,
    ramp_up,
    sharpened_log_probabilities,
)

IGNORE = 255
KINDS = ("multiclass", "binary")
TEMPERATURES = st.sampled_from([1.0, 0.9, 0.5, 0.25, 0.1])
SEEDS = st.integers(0, 2**31)

# ---- the equations in float64; arrays are [pixels, classes]


def probabilities(z: Any) -> Any:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sharpened(z: Any, temperature: float) -> Any:
    """Equation 5 by explicit powers of the softmax."""
    powers = probabilities(z) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def rest(s: Any) -> Any:
    """``1 - s_c``, as the sum of the other classes: without cancellation."""
    return np.stack([np.delete(s, c, axis=1).sum(axis=1) for c in range(s.shape[1])], axis=1)


def equation_6(s: Any, target: Any, kind: str) -> Any:
    """Loss of each pixel for a target distribution [pixels, classes]."""
    if kind == "multiclass":
        return -(target * np.log(s)).sum(axis=1)
    return -(target * np.log(s) + (1 - target) * np.log(rest(s))).sum(axis=1)


def gradient(s: Any, target: Any, temperature: float, kind: str) -> Any:
    """dL/dz by the chain rule through ``ds_c/dz_k = s_c (delta_ck - s_k) / T``."""
    slope = -target / s
    if kind == "binary":
        slope = slope + (1 - target) / rest(s)
    jacobian = s[:, :, None] * (np.eye(s.shape[1]) - s[:, None, :]) / temperature
    return np.einsum("nc,nck->nk", slope, jacobian)


# ---- material


def pixels(tensor: Tensor) -> Any:
    """[B,K,H,W] -> float64 [B*H*W, K]."""
    return tensor.detach().double().movedim(1, -1).flatten(0, -2).numpy()


def random_case(seed: int, classes: int, spread: float = 0.7, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, classes, 3, 5, generator=generator)
    labels = torch.randint(0, classes, (2, 3, 5), generator=generator)
    hidden = torch.rand(labels.shape, generator=generator) < ignored
    return logits, torch.where(hidden, IGNORE, labels)


def soft_case(seed: int, classes: int) -> tuple[Tensor, Tensor]:
    logits, labels = random_case(seed, classes)
    guess = torch.softmax(random_case(seed + 1, classes)[0], dim=1)
    return logits, guess * (labels != IGNORE)[:, None]


def distribution(target: Tensor, classes: int) -> Any:
    if target.is_floating_point():
        return pixels(target)
    return np.eye(classes)[np.where(target.flatten() == IGNORE, 0, target.flatten())]


def value_and_gradient(logits: Tensor, target: Tensor, temperature: float, kind: str) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = cross_entropy_sum(leaf, target, temperature, kind)
    (slope,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope


def check_against_numpy(logits: Tensor, target: Tensor, temperature: float, kind: str) -> None:
    valid = (target.sum(1) > 0 if target.is_floating_point() else target != IGNORE).flatten().numpy()
    s = sharpened(pixels(logits), temperature)
    wanted = distribution(target, logits.shape[1])
    value, slope = value_and_gradient(logits, target, temperature, kind)
    assert value.dtype == torch.float32
    assert value.shape == ()
    np.testing.assert_allclose(value.double(), equation_6(s, wanted, kind)[valid].sum(), rtol=1e-5, atol=1e-5)
    expected = gradient(s, wanted, temperature, kind) * valid[:, None]
    np.testing.assert_allclose(pixels(slope), expected, rtol=1e-3, atol=1e-4)
    assert float(pixel_count(target)) == valid.sum()


# ---- equation 5


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, classes=st.integers(1, 9), temperature=TEMPERATURES)
def test_sharpening_in_log_space_is_equation_5_by_powers(seed: int, classes: int, temperature: float) -> None:
    logits, _ = random_case(seed, classes)
    got = pixels(sharpened_log_probabilities(logits, temperature))
    np.testing.assert_allclose(got, np.log(sharpened(pixels(logits), temperature)), rtol=1e-5, atol=2e-6)
    exact = pixels(torch.log_softmax(logits.double() / temperature, dim=1))
    np.testing.assert_allclose(exact, np.log(sharpened(pixels(logits), temperature)), rtol=1e-10, atol=1e-12)


def test_sharpening_lowers_the_entropy_and_keeps_the_argmax() -> None:
    logits, _ = random_case(0, 6)
    plain, sharp = (sharpened_log_probabilities(logits, t) for t in (1.0, 0.5))
    assert bool((-(sharp.exp() * sharp).sum(1) < -(plain.exp() * plain).sum(1)).all())
    assert torch.equal(plain.argmax(1), sharp.argmax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sharpening_is_float32_also_under_autocast(dtype: torch.dtype) -> None:
    logits = random_case(0, 5)[0].to(dtype)
    plain = sharpened_log_probabilities(logits, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sharpened_log_probabilities(logits, 0.5)
    assert plain.dtype == inside.dtype == torch.float32
    assert torch.equal(plain, inside)
    np.testing.assert_allclose(pixels(plain), np.log(sharpened(pixels(logits), 0.5)), rtol=1e-5, atol=2e-6)


# ---- equation 6


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 8), temperature=TEMPERATURES)
def test_cross_entropy_and_its_gradient(kind: str, seed: int, classes: int, temperature: float) -> None:
    logits, labels = random_case(seed, classes, spread=min(1.0, 1.4 * temperature))
    check_against_numpy(logits, labels, temperature, kind)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 6), temperature=st.sampled_from([1.0, 0.5]))
def test_soft_targets(kind: str, seed: int, classes: int, temperature: float) -> None:
    check_against_numpy(*soft_case(seed, classes), temperature, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_target_of_certainty_is_the_hard_target(kind: str) -> None:
    logits, labels = random_case(5, 4)
    certain = torch.nn.functional.one_hot(labels.where(labels != IGNORE, 0), 4).movedim(-1, 1).float()
    certain = certain * (labels != IGNORE)[:, None]
    hard, soft = (value_and_gradient(logits, target, 0.5, kind) for target in (labels, certain))
    torch.testing.assert_close(hard, soft, rtol=1e-6, atol=1e-6)
    assert torch.equal(pixel_count(labels), pixel_count(certain))


def test_two_classes_binary_is_twice_multiclass() -> None:
    logits, labels = random_case(2, 2)  # 1 - p of the one class is p of the other
    binary, multiclass = (cross_entropy_sum(logits, labels, 0.5, kind) for kind in ("binary", "multiclass"))
    torch.testing.assert_close(binary, 2 * multiclass)


def test_hand_worked_pixel() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().reshape(1, 3, 1, 1)
    label = torch.tensor([[[1]]])
    sharp = 0.09 / (0.25 + 0.09 + 0.04)
    assert math.isclose(cross_entropy_sum(logits, label), -math.log(0.3), rel_tol=1e-6)
    assert math.isclose(cross_entropy_sum(logits, label, 0.5), -math.log(sharp), rel_tol=1e-6)
    binary = -(math.log(0.3) + math.log(0.5) + math.log(0.8))
    assert math.isclose(cross_entropy_sum(logits, label, kind="binary"), binary, rel_tol=1e-6)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="multiclass, binary"):
        cross_entropy_sum(*random_case(0, 3), kind="dice")


# ---- ignored pixels


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 6), soft=st.booleans(), junk=st.sampled_from([0.0, -7.5, 1e4, -1e30]))
def test_ignored_pixels_have_no_influence(kind: str, seed: int, classes: int, soft: bool, junk: float) -> None:
    logits, target = soft_case(seed, classes) if soft else random_case(seed, classes)
    ignored = (target.sum(1) == 0 if soft else target == IGNORE)[:, None]
    other = torch.where(ignored, junk * torch.rand(logits.shape), logits)
    value, slope = value_and_gradient(logits, target, 0.5, kind)
    changed, changed_slope = value_and_gradient(other, target, 0.5, kind)
    assert torch.equal(value, changed)
    assert torch.equal(slope, changed_slope)
    assert not bool(slope.masked_select(ignored).any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_all_ignored_is_zero_and_not_nan(kind: str, soft: bool) -> None:
    logits, _ = random_case(0, 4)
    target = torch.zeros(logits.shape) if soft else torch.full((2, 3, 5), IGNORE)
    value, slope = value_and_gradient(logits, target, 0.5, kind)
    assert value == 0
    assert not bool(slope.any())
    assert pixel_count(target) == 0


# ---- extreme logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_extreme_logits_stay_finite(kind: str, dtype: torch.dtype, label: int) -> None:
    logits = torch.tensor([1e4, 0.0, -1e4], dtype=dtype).reshape(1, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        value, slope = value_and_gradient(logits, torch.full((1, 1, 1), label), 0.5, kind)
    assert bool(value.isfinite())
    assert bool(slope.isfinite().all())
    if kind == "multiclass":
        assert value == ((logits[0, 0] - logits[0, label]) / 0.5).float()
    if label == 0:  # right and certain
        assert value == 0


@pytest.mark.parametrize("margin", [1.0, 4.0, 7.0, 9.0, 12.0])
def test_a_confident_mistake_keeps_its_gradient_in_the_binary_loss(margin: float) -> None:
    """Sharpened at T = 0.5, a lead of 8 in the logits is already a probability of 1 - 1e-7."""
    logits = torch.tensor([margin, 0.0, -1.0]).reshape(1, 3, 1, 1)
    s = sharpened(pixels(logits), 0.5)
    target = np.eye(3)[[1]]
    value, slope = value_and_gradient(logits, torch.tensor([[[1]]]), 0.5, "binary")
    np.testing.assert_allclose(value, equation_6(s, target, "binary")[0], rtol=1e-3)
    np.testing.assert_allclose(pixels(slope), gradient(s, target, 0.5, "binary"), rtol=1e-2, atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.floats(-80, -1e-5))
def test_log1mexp(x: float) -> None:
    exact = float(np.float32(x))
    expected = math.log(-math.expm1(exact)) if exact > -0.5 else math.log1p(-math.exp(exact))
    assert math.isclose(log1mexp(torch.tensor(x)), expected, rel_tol=1e-5, abs_tol=1e-37)


def test_log1mexp_at_the_ends() -> None:
    ends = torch.tensor([0.0, -0.0, -1e-12, -1e30, -math.inf], requires_grad=True)
    value = log1mexp(ends)
    (slope,) = torch.autograd.grad(value.sum(), ends)
    assert bool(value.isfinite().all())
    assert bool(slope.isfinite().all())
    assert value[-1] == 0


# ---- targets


def test_pseudo_labels_are_the_argmax_where_the_image_has_data() -> None:
    logits, labels = random_case(1, 5)
    valid = labels != IGNORE
    target = pseudo_label(logits, valid)
    assert target.dtype == torch.int64
    assert torch.equal(target[valid], logits.argmax(1)[valid])
    assert bool((target[~valid] == IGNORE).all())
    assert pixel_count(target) == valid.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_pseudo_labels_are_the_probabilities_where_the_image_has_data(dtype: torch.dtype) -> None:
    logits, labels = random_case(1, 5)
    valid = labels != IGNORE
    target = pseudo_label(logits.to(dtype), valid, soft=True)
    assert target.dtype == torch.float32
    expected = probabilities(pixels(logits.to(dtype))) * valid.flatten().numpy()[:, None]
    np.testing.assert_allclose(pixels(target), expected, rtol=1e-5, atol=1e-7)
    assert pixel_count(target) == valid.sum()


def test_ignore_is_one_number() -> None:
    assert base.IGNORE == shards.manifest.IGNORE == IGNORE


@settings(deadline=None)
@given(start=st.integers(0, 50), ramp=st.integers(0, 50), step=st.integers(0, 200))
def test_ramp_up(start: int, ramp: int, step: int) -> None:
    weight = ramp_up(step, start, ramp)
    if step < start:
        assert weight == 0
    elif step >= start + ramp:
        assert weight == 1
    else:
        assert math.isclose(weight, math.exp(-5 * (1 - (step - start) / ramp) ** 2))
    assert ramp_up(step + 1, start, ramp) >= weight
