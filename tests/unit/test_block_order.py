"""Order "block" against the rules of docs/data.md, worked out here in plain Python from Philox4x64-10 itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dctc.data.order import BlockOrder, Layout, RankBatchSampler, stream_slice

SHARDS = st.lists(
    st.integers(0, 7), min_size=1, max_size=61
)  # the shard of each tile: any sizes, some shards without one


def words(seed: int, stream: int, number: int, domain: int, group: int, count: int) -> list[int]:
    """As docs/data.md has it."""
    mask, out, block = 2**64 - 1, list[int](), 0
    while len(out) < count:
        block += 1
        c, k = [block, group, number, domain], [seed, stream]
        for _ in range(10):
            p, q = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [q >> 64 ^ c[1] ^ k[0], q & mask, p >> 64 ^ c[3] ^ k[1], p & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        out += c
    return out[:count]


def ranked(keys: list[int]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)


def epoch_of(shards: list[int], seed: int, stream: int, mix: int, epoch: int) -> list[list[int]]:
    """The groups of an epoch: the tiles of each, in their order."""
    blocks = [[tile for tile, of in enumerate(shards) if of == shard] for shard in sorted(set(shards))]
    permuted = [blocks[k] for k in ranked(words(seed, stream, epoch, 2, 0, len(blocks)))]
    count = -(-len(blocks) // mix)
    groups = []
    for number in range(count):
        size = len(blocks) // count + (number < len(blocks) % count)
        tiles = [tile for block in permuted[:size] for tile in block]
        permuted = permuted[size:]
        groups.append([tiles[k] for k in ranked(words(seed, stream, epoch, 3, number, len(tiles)))])
    return groups


@settings(deadline=None, max_examples=60)
@given(SHARDS, st.integers(1, 9), st.integers(0, 2**63 - 1), st.integers(0, 1), st.integers(0, 200), st.integers(0, 90))
def test_the_stream_is_the_documented_one(
    shards: list[int], mix: int, seed: int, stream: int, start: int, length: int
) -> None:
    order = BlockOrder(np.array(shards, np.uint32), seed, stream, mix)
    last = (start + length) // len(shards) + 1
    whole = [t for e in range(last) for group in epoch_of(shards, seed, stream, mix, e) for t in group]
    assert stream_slice(order, start, start + length).tolist() == whole[start : start + length]


@settings(deadline=None, max_examples=40)
@given(SHARDS, st.integers(1, 9), st.integers(0, 5))
def test_each_tile_once_an_epoch_and_each_shard_in_one_stretch(shards: list[int], mix: int, epoch: int) -> None:
    order, size = BlockOrder(np.array(shards, np.uint32), 1, 1, mix), len(shards)
    tiles = stream_slice(order, epoch * size, (epoch + 1) * size).tolist()
    assert sorted(tiles) == list(range(size))
    place, before = 0, set[int]()
    while place < size:
        begin, segment = order.segment(epoch * size + place)
        assert begin == epoch * size + place
        needed = {shards[tile] for tile in segment}
        assert len(needed) <= mix
        assert not needed & before, "no shard is needed again once its group is over"
        before |= needed
        place += len(segment)


def test_it_differs_by_epoch_seed_and_stream() -> None:
    shards = np.repeat(np.arange(12, dtype=np.uint32), 5)
    found = {
        tuple(stream_slice(BlockOrder(shards, seed, stream, 4), epoch * 60, (epoch + 1) * 60).tolist())
        for seed in (0, 1, 2**62)
        for stream in (0, 1)
        for epoch in range(3)
    }
    assert len(found) == 18


@settings(deadline=None, max_examples=30)
@given(SHARDS.filter(lambda shards: len(shards) >= 6), st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 2), (6, 2)]))
def test_any_layout_reads_the_same_rounds(shards: list[int], shape: tuple[int, int]) -> None:
    world, accumulation = shape
    order, rows = BlockOrder(np.array(shards, np.uint32), 4, 1, 3), np.arange(len(shards))[::-1] * 7
    rounds = range(2, 8)
    read = [list(RankBatchSampler(rows, order, 12, rounds, Layout(world, rank, accumulation))) for rank in range(world)]
    joined = [
        pair
        for number in range(len(rounds))
        for batches in read
        for batch in batches[number * accumulation : (number + 1) * accumulation]
        for pair in batch
    ]
    assert joined == list(zip(range(24, 96), rows[stream_slice(order, 24, 96)].tolist(), strict=True))
