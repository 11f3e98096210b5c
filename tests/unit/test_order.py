"""The order of tiles is a published function: its values are worked out here from Philox4x64-10 itself, and pinned."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dctc.data.augment import SYMMETRIES, View
from dctc.data.geometry import square_symmetry
from dctc.data.loaders import evaluation_rows
from dctc.data.order import (
    LABELLED,
    UNLABELLED,
    GlobalOrder,
    Indices,
    Layout,
    RankBatchSampler,
    augmentation_words,
    permutation,
    stream_slice,
)
from shards.errors import InputError

LAYOUTS = [(1, 1), (1, 2), (1, 12), (2, 1), (2, 3), (3, 1), (3, 4), (4, 1), (6, 2), (12, 1)]  # ranks, micro-batches
GLOBAL = 12
PRIME = 31  # tiles; 12 does not divide it, so that epochs end inside batches


def philox(seed: int, stream: int, number: int, domain: int, count: int) -> list[int]:
    """Words of Philox4x64-10 (Salmon et al. 2011) for key (seed, stream) and counter (1, 0, number, domain) onwards."""
    mask, words = 2**64 - 1, []
    for block in range(-(-count // 4)):
        c, k = [block + 1, 0, number, domain], [seed, stream]
        for _ in range(10):
            low, high = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [high >> 64 ^ c[1] ^ k[0], high & mask, low >> 64 ^ c[3] ^ k[1], low & mask]
            k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
        words += c
    return words[:count]


def rows(count: int = PRIME) -> Indices:
    """Index rows that are not their own positions."""
    return np.arange(count, dtype=np.int64)[::-1] * 10 + 3


def sampled(
    size: int, rounds: range, ranks: int, micro: int, seed: int = 5, stream: int = 1
) -> list[list[tuple[int, int]]]:
    """The global batches of a layout: ranks in order, their micro-batches in order."""
    samplers = [
        RankBatchSampler(rows(size), GlobalOrder(size, seed, stream), GLOBAL, rounds, Layout(ranks, r, micro))
        for r in range(ranks)
    ]
    per_rank = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in per_rank] == [len(s) for s in samplers] == [len(rounds) * micro] * ranks
    return [
        [pair for batches in per_rank for batch in batches[number * micro : (number + 1) * micro] for pair in batch]
        for number in range(len(rounds))
    ]


# ---- the permutation


def test_pinned_values_never_change() -> None:
    assert permutation(10, seed=0, stream=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, seed=0, stream=1, epoch=0).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(10, seed=0, stream=0, epoch=1).tolist() == [1, 9, 2, 8, 3, 5, 0, 4, 7, 6]
    assert permutation(10, seed=1, stream=0, epoch=0).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert augmentation_words(0, 0, np.arange(3))[:, 0].tolist() == [
        6312158256571094726,
        8354756903490811466,
        6947585203505507521,
    ]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 1), st.integers(0, 2**40))
def test_the_permutation_sorts_the_words_of_philox(size: int, seed: int, stream: int, epoch: int) -> None:
    words = philox(seed, stream, epoch, 0, size)
    assert permutation(size, seed, stream, epoch).tolist() == sorted(range(size), key=words.__getitem__)
    assert augmentation_words(seed, stream, np.array([epoch]), 3)[0].tolist() == philox(seed, stream, epoch, 1, 3)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 1), st.integers(0, 10**6))
def test_it_is_a_permutation(size: int, seed: int, stream: int, epoch: int) -> None:
    order = permutation(size, seed, stream, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))
    assert np.array_equal(order, permutation(size, seed, stream, epoch))


def test_it_differs_by_epoch_seed_and_stream() -> None:
    orders = {
        tuple(permutation(50, seed, stream, epoch).tolist())
        for seed in (0, 1, 2**62)
        for stream in (LABELLED, UNLABELLED)
        for epoch in range(5)
    }
    assert len(orders) == 3 * 2 * 5


def test_every_tile_is_equally_likely_everywhere() -> None:
    first = Counter(int(permutation(5, seed, 0, epoch)[0]) for seed in range(20) for epoch in range(50))
    assert all(150 < first[tile] < 250 for tile in range(5))  # 200 expected, 4 sigma = 51


# ---- the stream


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 200), st.integers(0, 200), st.integers(0, 99))
def test_a_slice_is_a_slice_of_the_joined_epochs(size: int, start: int, length: int, seed: int) -> None:
    joined = np.concatenate([permutation(size, seed, 1, epoch) for epoch in range((start + length) // size + 1)])
    assert np.array_equal(
        stream_slice(GlobalOrder(size, seed, 1), start, start + length), joined[start : start + length]
    )


@pytest.mark.parametrize("size", [2, 7, 31, 97])
def test_each_tile_comes_exactly_once_an_epoch(size: int) -> None:
    stream = stream_slice(GlobalOrder(size, 3, 0), 0, 5 * size)
    for epoch in range(5):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_a_stream_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        stream_slice(GlobalOrder(0, 0, 0), 0, 4)


# ---- the sampler


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_every_layout_reads_the_stream(ranks: int, micro: int) -> None:
    for number, batch in enumerate(sampled(PRIME, range(9), ranks, micro)):
        start = number * GLOBAL
        assert [position for position, _ in batch] == list(range(start, start + GLOBAL))
        expected = rows()[stream_slice(GlobalOrder(PRIME, 5, 1), start, start + GLOBAL)]
        assert [row for _, row in batch] == expected.tolist()


def test_an_epoch_may_end_inside_a_batch() -> None:
    read = [row for batch in sampled(PRIME, range(PRIME), 2, 3) for _, row in batch]  # 12 epochs in 31 rounds
    for epoch in range(GLOBAL):
        assert sorted(read[epoch * PRIME : (epoch + 1) * PRIME]) == sorted(rows())


def test_a_batch_may_be_longer_than_an_epoch() -> None:
    read = [row for batch in sampled(5, range(10), 4, 1) for _, row in batch]
    assert all(sorted(read[start : start + 5]) == sorted(rows(5)) for start in range(0, 120, 5))


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS[::3])
def test_resuming_at_any_round_on_any_layout_reads_the_tail(ranks: int, micro: int) -> None:
    whole = sampled(PRIME, range(8), 1, 1)
    for start in range(8):
        assert sampled(PRIME, range(start, 8), ranks, micro) == whole[start:]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(5, 40), st.integers(0, 30), st.integers(0, 99)
)
def test_any_layout_and_size(ranks: int, micro: int, each: int, tiles: int, start: int, seed: int) -> None:
    batch, rounds = ranks * micro * each, range(start, start + 3)
    read = [[], [], []]  # type: list[list[int]]
    for rank in range(ranks):
        sampler = RankBatchSampler(rows(tiles), GlobalOrder(tiles, seed, 0), batch, rounds, Layout(ranks, rank, micro))
        for number, members in enumerate(sampler):
            assert len(members) == each
            read[number // micro] += [row for _, row in members]
    for number, members_of_all in zip(rounds, read, strict=True):
        expected = rows(tiles)[stream_slice(GlobalOrder(tiles, seed, 0), number * batch, (number + 1) * batch)]
        assert members_of_all == expected.tolist()


@pytest.mark.parametrize(("ranks", "micro"), [(5, 1), (1, 5), (8, 3), (24, 1)])
def test_a_batch_that_does_not_divide_is_refused(ranks: int, micro: int) -> None:
    with pytest.raises(InputError, match=f"batch of 12 .* {ranks} ranks x {micro} .* multiple of {ranks * micro}"):
        RankBatchSampler(rows(), GlobalOrder(PRIME, 0, 0), GLOBAL, range(1), Layout(ranks, 0, micro))


def test_fewer_tiles_than_ranks_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 selected tiles for 4 ranks.*labelled_share"):
        RankBatchSampler(rows(3), GlobalOrder(3, 0, 0), GLOBAL, range(1), Layout(4, 0))
    with pytest.raises(InputError, match="0 selected tiles"):
        RankBatchSampler(rows(0), GlobalOrder(0, 0, 0), GLOBAL, range(1), Layout())
    RankBatchSampler(rows(4), GlobalOrder(4, 0, 0), GLOBAL, range(1), Layout(4, 3))


# ---- evaluation


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 31, 97])
def test_evaluation_sees_each_tile_once_in_equally_many_full_batches(ranks: int, batch: int, count: int) -> None:
    parts = [evaluation_rows(rows(count), batch, Layout(ranks, rank)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # else a collective call inside would hang
    assert all(members.shape == (batch,) for part in parts for members in part)
    seen = [int(row) for part in parts for members in part for row in members]
    assert Counter(row for row in seen if row >= 0) == Counter(rows(count).tolist())
    assert sum(row == -1 for row in seen) < batch * ranks  # no more padding than needed


# ---- augmentation


def tiles_of(batch: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [B,2,4,4], masks and labels [B,4,4] that are the same picture, different for each row."""
    picture = torch.stack([torch.arange(16).reshape(4, 4) + row for _, row in batch])
    return torch.stack([picture, -picture], 1).float(), picture % 3 == 0, picture


def test_the_eight_symmetries_are_eight() -> None:
    picture = torch.arange(9).reshape(3, 3)
    seen = {tuple(square_symmetry(picture, which).flatten().tolist()) for which in range(SYMMETRIES)}
    assert len(seen) == SYMMETRIES == 8
    assert {shown[4] for shown in seen} == {4}  # the middle stays
    corners = {0, 2, 8, 6}
    assert all({shown[0], shown[2], shown[6], shown[8]} == corners for shown in seen)


def test_image_mask_and_label_are_turned_alike() -> None:
    batch = [(position, position) for position in range(64)]
    images, valid, labels = tiles_of(batch)
    positions = torch.arange(64)
    turned, turned_valid, turned_labels = View("flips", 3, 0)(images, valid, labels, positions)
    assert turned_labels is not None
    assert torch.equal(turned[:, 0].long(), turned_labels)
    assert torch.equal(turned[:, 1].long(), -turned_labels)
    assert torch.equal(turned_valid, turned_labels % 3 == 0)
    words = augmentation_words(3, 0, np.arange(64))[:, 0] % SYMMETRIES
    assert len(set(words.tolist())) == SYMMETRIES
    for sample, word in enumerate(words):
        assert torch.equal(turned_labels[sample], square_symmetry(labels[sample], int(word)))


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_augmented_pixels_are_the_same_on_any_layout(ranks: int, micro: int) -> None:
    def augmented(world: int, accumulation: int, rounds: range) -> list[torch.Tensor]:
        whole = []
        for batch in sampled(PRIME, rounds, world, accumulation):
            size = GLOBAL // (world * accumulation)
            pieces = [batch[start : start + size] for start in range(0, GLOBAL, size)]  # as each rank sees them
            turned = [
                View("flips", 5, 1)(*tiles_of(piece), torch.tensor([position for position, _ in piece]))[0]
                for piece in pieces
            ]
            whole.append(torch.cat(turned))
        return whole

    alone, here = augmented(1, 1, range(4)), augmented(ranks, micro, range(2, 4))  # resumed at round 2
    assert all(torch.equal(a, b) for a, b in zip(alone[2:], here, strict=True))


def test_a_tile_is_turned_anew_each_epoch() -> None:
    words = (
        augmentation_words(0, 0, np.arange(0, 31 * 20, 31))[:, 0] % SYMMETRIES
    )  # one tile's positions were the order fixed
    assert len(set(words.tolist())) > 4
    assert not np.array_equal(augmentation_words(0, 0, np.arange(9)), augmentation_words(0, 1, np.arange(9)))
