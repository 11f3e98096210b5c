from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.manifest import parse_share, share_count
from shards.sections import SceneLists, Shares, Splits
from shards.splits import (
    TEST,
    TRAIN,
    UNRANKED,
    VAL,
    draw,
    key_hashes,
    nested_order,
    permutation,
    ranks,
    scene_splits,
    share_length,
)


def test_permutation_is_what_philox_defines() -> None:
    # Written down once: a change would reshuffle every dataset.
    assert permutation(0, 1, 8).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    assert sorted(permutation(7, 2, 1000).tolist()) == list(range(1000))
    assert permutation(7, 2, 1000).tolist() != permutation(8, 2, 1000).tolist()
    assert permutation(7, 1, 1000).tolist() != permutation(7, 2, 1000).tolist()


def test_key_hash_by_hand() -> None:
    # printf 2_13_r00512_c01024 | sha256sum
    assert key_hashes(["2_13_r00512_c01024"]).tolist() == [int.from_bytes(bytes.fromhex("2f091fa1a9b6aeba"), "little")]


masks = st.lists(st.integers(0, 63).filter(bool), min_size=1, max_size=60)


@settings(deadline=None)
@given(masks=masks, seed=st.integers(0, 50))
def test_nested_subsets_have_every_class_as_soon_as_possible(masks: list[int], seed: int) -> None:
    order = nested_order(seed, masks).tolist()
    assert sorted(order) == list(range(len(masks)))
    everything = int(np.bitwise_or.reduce(masks))
    fewest = 6  # classes: at most one tile for each is moved
    seen = 0
    for tile in order[:fewest]:
        seen |= masks[tile]
    assert seen == everything
    # What was not moved keeps the order of the plain permutation.
    plain = permutation(seed, 1, len(masks)).tolist()
    tail = order[fewest:]
    assert tail == [tile for tile in plain if tile in set(tail)]


@given(total=st.integers(1, 500), shares=st.lists(st.fractions(min_value=Fraction(1, 99), max_value=1), min_size=2))
def test_shares_nest_and_none_is_empty(total: int, shares: list[Fraction]) -> None:
    counts = [share_count(share, total) for share in sorted(shares)]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert share_count(Fraction(1), total) == total


@pytest.mark.parametrize(
    ("text", "share"), [("1/8", Fraction(1, 8)), (0.125, Fraction(1, 8)), ("12.5%", Fraction(1, 8)), (1, Fraction(1))]
)
def test_parse_share(text: str | float, share: Fraction) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["0", "-1/2", "9/8", "101%", "x", "1/0", ""])
def test_wrong_shares(text: str) -> None:
    with pytest.raises(InputError, match="labelled share"):
        parse_share(text)


@given(count=st.integers(5, 400), seed=st.integers(0, 20), test=st.floats(0, 0.4), val=st.floats(0, 0.3))
def test_draw_takes_the_shares(count: int, seed: int, test: float, val: float) -> None:
    codes = draw(Shares(test_share=test, val_share=val), seed, count, "tiles")
    for code, share in ((TEST, test), (VAL, val)):
        expected = 0 if share == 0 else max(1, int(share * count + 0.5))
        assert (codes == code).sum() == expected
    assert (codes == TRAIN).any()
    assert np.array_equal(codes, draw(Shares(test_share=test, val_share=val), seed, count, "tiles"))


def test_draw_leaves_something_to_train_on() -> None:
    with pytest.raises(InputError, match="2 labelled scenes are too few"):
        draw(Shares(test_share=0.4, val_share=0.4), 0, 2, "scenes")


SCENES = [("a1", True), ("a2", True), ("b1", True), ("b2", False)]


def scenes(**lists: list[str]) -> Splits:
    return Splits(protocol="scene", scene=SceneLists(**lists))  # type: ignore[arg-type]


def test_lists_are_looked_up_test_val_train() -> None:
    codes = scene_splits(scenes(test=["a1"], val=["a*"], train=["*"]), SCENES)
    assert codes == {"a1": TEST, "a2": VAL, "b1": TRAIN, "b2": TRAIN}


def test_a_scene_in_no_list_is_an_error() -> None:
    with pytest.raises(InputError, match="scene 'b1' stands in none of"):
        scene_splits(scenes(test=["a1"], train=["a*"]), SCENES)


def test_an_unlabelled_scene_cannot_test() -> None:
    with pytest.raises(InputError, match=r"scene 'b2' stands in splits\.scene\.test but has no label"):
        scene_splits(scenes(test=["b*"], train=["a*"]), SCENES)


def test_without_lists_labelled_scenes_are_drawn() -> None:
    many = [(f"s{i:02d}", i % 3 > 0) for i in range(30)]
    codes = scene_splits(Splits(protocol="scene", scene=SceneLists(test_share=0.2, val_share=0.1), seed=4), many)
    assert sorted(codes.values()) == [TRAIN] * 24 + [VAL] * 2 + [TEST] * 4
    assert all(codes[scene] == TRAIN for scene, labelled in many if not labelled)


def test_ranks_skip_other_splits_and_tiles_without_a_class() -> None:
    split_of = np.array([TRAIN, TEST, TRAIN, TRAIN, VAL], dtype=np.uint8)
    rank_of = ranks(0, "tile", [1, 1, 0, 2, 3], split_of, np.zeros(5, dtype=np.uint32))
    assert sorted(rank_of.tolist()) == [0, 1, UNRANKED, UNRANKED, UNRANKED]
    assert rank_of[[1, 2, 4]].tolist() == [UNRANKED] * 3


@settings(max_examples=60, deadline=None)
@given(
    scene_of=st.lists(st.integers(0, 7), min_size=1, max_size=60),
    masks=st.lists(st.integers(0, 15), min_size=60, max_size=60),
    seed=st.integers(0, 99),
)
def test_shares_by_scene_take_whole_scenes_and_nest(scene_of: list[int], masks: list[int], seed: int) -> None:
    scenes = np.sort(np.array(scene_of, dtype=np.uint32))
    own = masks[: len(scenes)]
    rank_of = ranks(seed, "scene", own, np.full(len(scenes), TRAIN, dtype=np.uint8), scenes)
    labelled = [row for row, mask in enumerate(own) if mask]
    order = [row for row in np.argsort(rank_of, kind="stable").tolist() if rank_of[row] != UNRANKED]
    assert sorted(order) == labelled
    before: set[int] = set()
    for share in (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1)):
        count = share_length(share, "scene", scenes[order])
        taken = set(order[:count])
        assert before <= taken
        chosen = {int(scenes[row]) for row in taken}
        assert taken == {row for row in labelled if int(scenes[row]) in chosen}
        of_labelled = {int(scenes[row]) for row in labelled}
        assert len(chosen) == -(-len(of_labelled) * share.numerator // share.denominator)
        before = taken
    assert before == set(labelled)


def test_listed_tiles_lead_the_nested_order() -> None:
    order = nested_order(3, [1, 1, 2, 4, 1, 2], first=[5, 1]).tolist()
    assert order[:2] == [5, 1]
    assert order[2] == 3, "the only class that the listed ones lack comes next"
    assert sorted(order) == list(range(6))
