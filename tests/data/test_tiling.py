from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.tiling import Edge, offsets, windows

sizes = st.integers(1, 40)


@given(length=st.integers(1, 300), size=sizes, data=st.data())
def test_pad_and_shift_cover_every_pixel_and_drop_stays_inside(length: int, size: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, size))
    for edge in ("pad", "shift", "drop"):
        starts = offsets(length, size, step, edge)
        covered = np.zeros(length + 2 * size, dtype=int)
        for start in starts:
            covered[start : start + size] += 1
        assert starts == sorted(set(starts))
        if edge == "drop":
            assert covered[length:].sum() == 0
            assert len(starts) == max(0, (length - size) // step + 1)
            continue
        assert covered[:length].all()
        assert len(starts) == len(offsets(length, size, step, "pad"))
        if edge == "shift" and length >= size:
            assert starts[-1] + size == length
        if length <= size:
            assert starts == [0]


@given(length=st.integers(1, 300), size=sizes)
def test_padded_tiles_without_overlap_hold_each_pixel_once(length: int, size: int) -> None:
    covered = np.zeros(length + size, dtype=int)
    for start in offsets(length, size, size, "pad"):
        covered[start : start + size] += 1
    assert (covered[:length] == 1).all()


@pytest.mark.parametrize(
    ("edge", "expected"),
    [("pad", [0, 64, 128]), ("shift", [0, 64, 86]), ("drop", [0, 64])],
)
def test_offsets_by_hand(edge: Edge, expected: list[int]) -> None:
    assert offsets(150, 64, 64, edge) == expected


def test_windows_run_row_by_row() -> None:
    found = [(w.row, w.col) for w in windows(100, 130, 64, 64, "pad")]
    assert found == [(0, 0), (0, 64), (0, 128), (64, 0), (64, 64), (64, 128)]
