from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.bandstats import PERCENTILES, Statistics
from tests.data.layouts import random_image

DTYPES = ["uint8", "uint16", "int16", "float32"]


def gathered(parts: list[npt.NDArray[Any]]) -> Statistics:
    statistics = Statistics(str(parts[0].dtype), len(parts[0]))
    for part in parts:
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_numpy_in_float64(dtype: str) -> None:
    image = random_image(3, 90, 70, 5, dtype).reshape(3, -1)
    statistics = gathered(np.array_split(image, 7, axis=1))
    for band in range(3):
        summary = statistics.summary(band)
        values = image[band].astype(np.float64)
        assert summary.mean == pytest.approx(values.mean(), rel=1e-13)
        assert summary.std == pytest.approx(values.std(), rel=1e-12)
        assert (summary.minimum, summary.maximum) == (values.min(), values.max())
        for percent in PERCENTILES:
            tolerance = 2**-11 if dtype == "float32" else 1e-13
            assert summary.percentiles[str(percent)] == pytest.approx(np.percentile(values, percent), rel=tolerance)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from(DTYPES), cuts=st.integers(1, 6))
def test_order_and_grouping_change_nothing(seed: int, dtype: str, cuts: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [
        random_image(2, 5, int(n), seed + k, dtype).reshape(2, -1) for k, n in enumerate(generator.integers(1, 30, 6))
    ]
    whole = gathered(parts)
    order = generator.permutation(6)
    groups = [gathered([parts[i] for i in group]) for group in np.array_split(order, cuts)]
    joined = groups[0]
    for group in groups[1:]:
        joined.merge(group)
    assert [joined.summary(band) for band in range(2)] == [whole.summary(band) for band in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_and_loaded(dtype: str, tmp_path: Path) -> None:
    statistics = gathered([random_image(2, 6, 9, k, dtype).reshape(2, -1) for k in range(3)])
    statistics.save(tmp_path / "s.npz")
    back = Statistics.load(tmp_path / "s.npz", dtype, 2)
    assert [back.summary(band) for band in range(2)] == [statistics.summary(band) for band in range(2)]


def test_extremes() -> None:
    low = gathered([np.full((1, 3), -32768, dtype=np.int16), np.full((1, 1), 32767, dtype=np.int16)]).summary(0)
    assert (low.minimum, low.maximum, low.percentiles["50"]) == (-32768, 32767, -32768)
    constant = gathered([np.full((1, 1000), 0.1, dtype=np.float32)]).summary(0)
    assert constant.std == 0
    assert constant.percentiles["50"] == constant.mean == float(np.float32(0.1))
    mixed = gathered([np.array([[-2.5, -0.0, 0.0, 4.0, 1e30]], dtype=np.float32)]).summary(0)
    assert (mixed.minimum, mixed.maximum, mixed.percentiles["50"]) == (-2.5, float(np.float32(1e30)), 0)
