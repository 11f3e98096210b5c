"""Expected calibration error against a formula in numpy; the same in any partition; ignored pixels count nowhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dctc.evaluation.calibration import BINS, Calibration

NAMES = ("a", "b", "c")


def data(seed: int, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, 3, 8, 9, generator=generator)
    truth = torch.randint(0, 3, (count, 8, 9), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 255
    return logits, truth, torch.rand(truth.shape, generator=generator) > 0.2


def by_numpy(logits: Tensor, truth: Tensor, valid: Tensor, only: int | None = None, temperature: float = 1.0) -> float:
    """Sum over bins of |sum of (right - confidence)|, over all pixels, pixel by pixel."""
    z = logits.double().numpy() / temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gaps, total = [0.0] * BINS, 0
    for index in np.ndindex(*truth.shape):
        label = int(truth[index])
        chances = p[index[0], :, index[1], index[2]]
        said = int(chances.argmax())
        if label == 255 or not valid[index] or only not in (None, said):
            continue
        gaps[min(BINS - 1, int(chances[said] * BINS))] += (said == label) - chances[said]
        total += 1
    return sum(map(abs, gaps)) / total


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_against_numpy(seed: int, temperature: float) -> None:
    meter = Calibration(3, temperature=temperature)
    meter.update(*data(seed))
    found = meter.result(NAMES)
    assert found.ece == pytest.approx(by_numpy(*data(seed), temperature=temperature), abs=1e-6)
    for index, name in enumerate(NAMES):
        expected = by_numpy(*data(seed), only=index, temperature=temperature)
        assert found.ece_of(index) == found.ece_by_class[name] == pytest.approx(expected, abs=1e-6)
    assert sum(int(row[2]) for row in found.rows()[1:]) == int(((data(seed)[1] != 255) & data(seed)[2]).sum())  # type: ignore[call-overload]  # a count


def test_a_net_that_is_as_good_as_it_says_has_no_error() -> None:
    """Three of four right at a confidence of 0.75."""
    logits = torch.zeros(1, 2, 1, 400)
    logits[:, 0] = math.log(3)
    truth = (torch.arange(400) % 4 == 0).long().view(1, 1, 400)
    meter = Calibration(2)
    meter.update(logits, truth, torch.ones_like(truth, dtype=torch.bool))
    assert meter.result(("x", "y")).ece == pytest.approx(0.0, abs=1e-6)
    wrong = Calibration(2)
    wrong.update(1000 * logits, 1 - truth * 0, torch.ones_like(truth, dtype=torch.bool))
    assert wrong.result(("x", "y")).ece == pytest.approx(1.0)
    assert wrong.result(("x", "y")).ece_by_class.keys() == {"x"}, "y is never predicted"
    assert math.isnan(Calibration(2).result(("x", "y")).ece)


def test_a_pixel_without_a_number_is_no_confidence() -> None:
    meter = Calibration(2)
    logits = torch.tensor([[0.0, math.nan], [0.0, 0.0]]).view(1, 2, 1, 2)
    meter.update(logits, torch.zeros(1, 1, 2, dtype=torch.int64), torch.ones(1, 1, 2, dtype=torch.bool))
    assert meter.result(("x", "y")).confidence.sum() == pytest.approx(0.5)


def test_it_never_reads_the_device() -> None:
    """Tensors on the meta device have no values: any read-back raises."""
    ids = torch.zeros(2, 8, 8, dtype=torch.int64, device="meta")
    Calibration(3, device="meta").update(torch.zeros(2, 3, 8, 8, device="meta"), ids, ids.bool())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), parts=st.integers(1, 4), noise=st.integers(0, 2**31))
def test_any_partition_gives_the_same_bits_and_ignored_pixels_have_no_influence(
    seed: int, parts: int, noise: int
) -> None:
    logits, truth, valid = data(seed)
    whole = Calibration(3)
    whole.update(logits, truth, valid)
    out = (truth == 255) | ~valid
    generator = torch.Generator().manual_seed(noise)
    other = torch.where(out[:, None], torch.randn(logits.shape, generator=generator), logits)
    ranks = [Calibration(3) for _ in range(parts)]
    for rank, pieces in zip(ranks, zip(*(t.chunk(parts) for t in (other, truth, valid)), strict=True), strict=False):
        rank.update(*pieces)
    total = torch.stack([rank.totals for rank in ranks]).sum(0)
    ranks[0].reduce(lambda _: total)
    first, second = whole.result(NAMES), ranks[0].result(NAMES)
    assert (first.pixels == second.pixels).all()
    assert (first.correct == second.correct).all()
    assert (first.confidence == second.confidence).all()
