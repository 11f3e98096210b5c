"""The grid of windows: every pixel covered, no window outside, overlaps as asked."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dctc.mapping.windows import Grid, spread
from shards.errors import InputError

SIDES = st.integers(1, 700)
TILES = st.integers(1, 96)
OVERLAPS = st.floats(0, 0.9)


@given(SIDES, SIDES, TILES, OVERLAPS)
def test_windows_cover_every_pixel_and_stay_inside(height: int, width: int, tile: int, overlap: float) -> None:
    grid = Grid.over(height, width, tile, overlap)
    for starts, side in ((grid.tops, height), (grid.lefts, width)):
        assert starts[0] == 0
        assert starts[-1] + tile == max(side, tile)
        steps = [after - before for before, after in itertools.pairwise(starts)]
        assert all(1 <= step <= tile - round(overlap * tile) or step == 1 for step in steps)
    assert grid.windows == len(grid.tops) * len(grid.lefts)


@given(SIDES, TILES, OVERLAPS)
def test_bands_finish_each_row_once_and_after_its_last_window(height: int, tile: int, overlap: float) -> None:
    grid = Grid.over(height, 10, tile, overlap)
    bands = list(grid.bands())
    assert [band.top for band in bands] == list(grid.tops)
    assert [band.done for band in bands] == [*grid.tops[1:], height]
    for band in bands:
        assert band.top < band.done <= band.bottom == min(band.top + tile, height)


@given(SIDES, TILES, st.data())
def test_no_fewer_windows_would_do(size: int, tile: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, tile))
    starts = spread(size, tile, stride)
    assert len(starts) == 1 + math.ceil(max(0, size - tile) / stride)
    steps = {after - before for before, after in itertools.pairwise(starts)}
    assert len(steps) == 0 or max(steps) - min(steps) <= 1


def test_overlap_is_shared_evenly() -> None:
    assert Grid.over(1000, 512, 512, 0.25).tops == (0, 244, 488)
    assert Grid.over(1000, 512, 512, 0.25).lefts == (0,)
    assert Grid.over(100, 513, 512, 0.0).lefts == (0, 1)


@pytest.mark.parametrize("overlap", [-0.1, 0.91, 1.0, math.nan])
def test_a_senseless_overlap_is_refused(overlap: float) -> None:
    with pytest.raises(InputError, match=r"overlap .* outside"):
        Grid.over(100, 100, 32, overlap)
