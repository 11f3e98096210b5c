from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.inputs import Palette
from shards.labels import IGNORE_VALUE, UNMATCHED, PaletteDecoder
from shards.sections import ClassColor
from tests.data.layouts import ISPRS, colored, random_ids

CLASSES = [
    ClassColor(name=f"c{k}", color=(int(color[0]), int(color[1]), int(color[2]))) for k, color in enumerate(ISPRS)
]


def decoder(**settings: Any) -> PaletteDecoder:
    return PaletteDecoder(Palette(pattern=["(?P<a>.)"], **settings), CLASSES)


def one(color: tuple[int, int, int], **settings: Any) -> int:
    return int(decoder(**settings).decode(np.array(color, dtype=np.uint8).reshape(3, 1, 1))[0, 0])


def test_exact_colours() -> None:
    ids = random_ids(6, 40, 50, 0)
    exact = decoder()
    assert np.array_equal(exact.decode(colored(ids, ISPRS)), ids)
    assert (exact.unmatched, exact.unknown_values()) == (0, [])


@pytest.mark.parametrize(
    ("color", "settings", "code"),
    [
        ((252, 255, 0), {}, UNMATCHED),
        ((252, 255, 0), {"tolerance": 2}, UNMATCHED),
        ((252, 255, 0), {"tolerance": 3}, 4),
        ((252, 255, 0), {"tolerance": 96, "threshold": 127}, 4),
        ((160, 90, 20), {"tolerance": 95, "threshold": 127}, 5),
        ((160, 90, 20), {"tolerance": 89, "threshold": 127}, UNMATCHED),
        ((255, 0, 255), {"tolerance": 127, "threshold": 127}, UNMATCHED),  # a corner that is no class
        ((3, 0, 9), {"tolerance": 96, "threshold": 127, "ignore_colors": [(0, 0, 0)]}, IGNORE_VALUE),
        ((0, 0, 0), {}, UNMATCHED),
        ((0, 0, 0), {"ignore_colors": [(0, 0, 0)]}, IGNORE_VALUE),
    ],
)
def test_tolerance_and_threshold_by_hand(color: tuple[int, int, int], settings: dict[str, Any], code: int) -> None:
    assert one(color, **settings) == code


def test_unknown_colours_are_counted_and_ranked() -> None:
    rgb = colored(random_ids(6, 20, 20, 1), ISPRS)
    rgb[:, 0, :7] = np.array([[9], [8], [7]])
    rgb[:, 1, :3] = np.array([[1], [2], [3]])
    exact = decoder()
    codes = exact.decode(rgb)
    exact.decode(rgb)
    assert (codes == UNMATCHED).sum() == 10
    assert (exact.unmatched, exact.pixels) == (20, 800)
    assert exact.unknown_values() == [("9,8,7", 14), ("1,2,3", 6)]


@settings(max_examples=30, deadline=None)
@given(tolerance=st.integers(0, 255), seed=st.integers(0, 1000))
def test_nearest_colour_against_a_plain_search(tolerance: int, seed: int) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    found = decoder(tolerance=tolerance).decode(rgb)
    for row in range(8):
        for col in range(8):
            reach = [max(abs(int(a) - int(b)) for a, b in zip(rgb[:, row, col], c, strict=True)) for c in ISPRS]
            best = reach.index(min(reach))
            assert found[row, col] == (best if reach[best] <= tolerance else UNMATCHED)
