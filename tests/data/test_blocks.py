from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.blocks import Places, block_splits, separation
from shards.errors import InputError
from shards.index import Index
from shards.manifest import SPLITS
from shards.pack import pack
from shards.sections import Blocks
from shards.splits import DROPPED, TEST, TRAIN, VAL
from shards.summary import summarize
from shards.tiles import read_tile
from shards.tiling import Edge, windows
from tests.data import layouts


def places_of(shapes: list[tuple[int, int]], size: int, step: int, edge: Edge) -> Places:
    found = [(k, w.row, w.col) for k, (h, w_) in enumerate(shapes) for w in windows(h, w_, size, step, edge)]
    scene, row, col = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Places(scene, row, col, size)


def between(places: Places, one: int, other: int) -> int:
    """Whole pixels between two tiles of one scene; negative where they overlap."""
    return max(abs(int(axis[one] - axis[other])) for axis in (places.row, places.col)) - places.size


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(10, 90), st.integers(10, 90)), min_size=1, max_size=3),
    step=st.integers(4, 8),
    edge=st.sampled_from(["pad", "shift"]),
    blocks=st.builds(
        Blocks,
        size=st.integers(1, 4),
        gap=st.integers(0, 9),
        test_share=st.just(0.3),
        val_share=st.sampled_from([0, 0.2]),
    ),
    seed=st.integers(0, 50),
    unlabelled=st.integers(0, 3),
)
def test_nothing_of_another_split_lies_within_the_gap(
    shapes: list[tuple[int, int]], step: int, edge: Edge, blocks: Blocks, seed: int, unlabelled: int
) -> None:
    places = places_of(shapes, 8, step, edge)
    labelled = np.arange(len(places.row)) % 4 >= unlabelled
    try:
        codes = block_splits(blocks, seed, step, places, labelled)
    except InputError:  # too few blocks, which has a test of its own
        return
    assert np.array_equal(codes, block_splits(blocks, seed, step, places, labelled))
    least: dict[str, int | None] = {"train-val": None, "train-test": None, "val-test": None}
    for a, b in product(range(len(codes)), repeat=2):
        if places.scene[a] == places.scene[b] and codes[a] < codes[b] < DROPPED:
            name = f"{SPLITS[codes[a]]}-{SPLITS[codes[b]]}"
            distance = between(places, a, b)
            assert distance >= blocks.gap
            least[name] = distance if least[name] is None else min(least[name] or 0, distance)
    assert separation(places, codes, blocks.gap).distances == least
    # Only what lies too near to a stronger split is left out; test tiles never are.
    side = blocks.size * step
    block = [
        (int(s), int(r) // side, int(c) // side) for s, r, c in zip(places.scene, places.row, places.col, strict=True)
    ]
    tested = {block[k] for k in np.flatnonzero(codes == TEST).tolist()}
    assert all(codes[k] == TEST for k in range(len(codes)) if block[k] in tested)
    for k in np.flatnonzero(codes == DROPPED).tolist():
        assert any(
            between(places, k, other) < blocks.gap
            for other in range(len(codes))
            if places.scene[other] == places.scene[k] and codes[other] in (TEST, VAL)
        )


def test_the_proof_is_measured_on_its_own() -> None:
    places = places_of([(32, 32)], 8, 8, "pad")
    codes = np.full(16, TRAIN, dtype=np.uint8)
    codes[5] = TEST
    assert separation(places, codes, 0).distances == {"train-val": None, "train-test": 0, "val-test": None}
    with pytest.raises(InputError, match="tiles of train-test lie 0 pixels apart, less than the gap 1"):
        separation(places, codes, 1)


def test_a_dataset_of_one_scene(tmp_path: Path) -> None:
    layouts.potsdam(tmp_path / "in", ["2_10"], 512, 512)
    recipe = layouts.recipe(
        "potsdam", "tile.size=32", "splits.protocol=block", "splits.block={size: 4, gap: 16, val_share: 0.1}"
    )
    packed = pack(recipe, tmp_path / "in", tmp_path / "set")
    manifest = packed.manifest
    assert manifest.separation is not None
    assert manifest.separation.gap == 16
    assert all(distance is None or distance >= 16 for distance in manifest.separation.distances.values())
    assert manifest.splits["test"].tiles == 3 * 16
    index = Index.open(packed)
    windows_of = {
        split: [read_tile(packed, index, row).meta["window"] for row in index.rows(split).tolist()] for split in SPLITS
    }
    for a, b in product(windows_of["train"], windows_of["test"]):
        assert max(abs(a["row"] - b["row"]), abs(a["col"] - b["col"])) - 32 >= 16
    assert packed.report.left_out == 256 - sum(info.tiles for info in manifest.splits.values()) > 0
    assert any("tiles are in no split" in line for line in packed.report.lines())
    assert summarize(packed)["separation"]["gap"] == 16


def test_too_few_blocks(tmp_path: Path) -> None:
    layouts.potsdam(tmp_path / "in", ["2_10"], 64, 64)
    recipe = layouts.recipe("potsdam", "tile.size=32", "splits.protocol=block")
    with pytest.raises(InputError, match="1 labelled blocks are too few"):
        pack(recipe, tmp_path / "in", tmp_path / "set")
