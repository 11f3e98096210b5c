"""Blending: weights form a partition of unity, and the rolling buffer equals a whole-scene weighted mean."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dctc.mapping.blend import Accumulator, partition, taper
from dctc.mapping.windows import Grid

CPU = torch.device("cpu")


@given(st.integers(1, 600), st.integers(1, 64), st.floats(0, 0.9))
def test_weights_are_positive_and_add_up_to_one_everywhere(size: int, tile: int, overlap: float) -> None:
    grid = Grid.over(size, size, tile, overlap)
    weights = partition(grid.tops, tile, grid.margin)
    assert weights.min() > 0
    total = np.zeros(max(size, tile))
    count = np.zeros(max(size, tile))
    for start, weight in zip(grid.tops, weights, strict=True):
        total[start : start + tile] += weight
        count[start : start + tile] += 1
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert (total[count == 1] == 1).all()  # alone means unchanged, to the last bit


@given(st.integers(2, 64), st.data())
def test_the_taper_is_symmetric_rises_to_the_middle_and_ignores_the_margin(tile: int, data: st.DataObject) -> None:
    margin = data.draw(st.integers(0, (tile - 1) // 4))
    weight = taper(tile, margin)
    np.testing.assert_allclose(weight, weight[::-1])
    assert (np.diff(weight[: tile // 2]) >= 0).all()
    assert weight.min() > 0
    assert (weight[:margin] < 1e-5).all()
    assert weight.max() > 0.49


@settings(max_examples=40)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 24), st.floats(0, 0.9), st.integers(1, 3), st.integers(0, 99)
)
def test_the_rolling_buffer_equals_the_weighted_mean_over_the_whole_scene(
    height: int, width: int, tile: int, overlap: float, batch: int, seed: int
) -> None:
    grid = Grid.over(height, width, tile, overlap)
    random = np.random.default_rng(seed)
    windows = random.random((len(grid.tops), len(grid.lefts), 2, tile, tile), np.float32)

    weight = np.outer(taper(tile, grid.margin), taper(tile, grid.margin))
    shape = (max(height, tile), max(width, tile))
    total, value = np.zeros(shape), np.zeros((2, *shape))
    for row, top in enumerate(grid.tops):
        for column, left in enumerate(grid.lefts):
            place = (slice(top, top + tile), slice(left, left + tile))
            total[place] += weight
            value[:, *place] += weight * windows[row, column]
    expected = (value / total)[:, :height, :width]

    blend = Accumulator(2, grid, CPU)
    strips = []
    for band in grid.bands():
        for start in range(0, len(grid.lefts), batch):
            columns = range(len(grid.lefts))[start : start + batch]
            blend.add(torch.from_numpy(windows[band.row][list(columns)]), band, columns)
        strips.append(blend.flush(band))
    np.testing.assert_allclose(torch.cat(strips, 1).numpy(), expected, atol=1e-5)
    assert not blend.buffer.any() or height < tile  # nothing is left behind


def test_the_buffer_does_not_grow_with_the_height() -> None:
    short, tall = (Accumulator(6, Grid.over(height, 256, 64, 0.25), CPU) for height in (256, 20_000))
    assert tall.buffer.shape == short.buffer.shape == (6, 64, 256)
    assert tall.buffer.dtype == torch.float32
