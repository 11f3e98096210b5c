"""Train, validation and test; the nested labelled subsets. All of it is a pure function of seeds and names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.manifest import SPLITS, share_count
from shards.sections import SceneLists, Shares, Splits

TRAIN, VAL, TEST = (SPLITS.index(name) for name in ("train", "val", "test"))
DROPPED = 255  # a tile that is in no split
UNRANKED = 0xFFFFFFFF
_LABELLED_STREAM, _SPLIT_STREAM = 1, 2


def permutation(seed: int, stream: int, count: int) -> npt.NDArray[np.int64]:
    """A permutation of ``count`` items that depends on its arguments alone.

    Raw Philox words and a stable sort are fixed by their definitions; numpy's own ``permutation`` may change between
    versions.
    """
    words = np.random.Philox(key=(stream << 64) | (seed & (1 << 64) - 1)).random_raw(count)
    return np.argsort(words, kind="stable")


def key_hashes(keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    """First 8 bytes of sha256 of each key, little endian."""
    words = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
    return np.array(words, dtype=np.uint64)


def draw(shares: Shares, seed: int, count: int, what: str) -> npt.NDArray[np.uint8]:
    """Split codes of ``count`` items of which ``test_share`` and ``val_share`` are drawn, at least one each if above 0.

    Raises:
        InputError: when nothing would be left to train on.
    """
    test, val = (
        max(1, int(share * count + 0.5)) if share > 0 else 0 for share in (shares.test_share, shares.val_share)
    )
    if test + val >= count:
        raise InputError(
            f"{count} labelled {what} are too few for test_share {shares.test_share} and val_share "
            f"{shares.val_share}: nothing would be left to train on"
        )
    order = permutation(seed, _SPLIT_STREAM, count)
    codes = np.full(count, TRAIN, dtype=np.uint8)
    codes[order[:test]] = TEST
    codes[order[test : test + val]] = VAL
    return codes


def scene_splits(splits: Splits, scenes: Sequence[tuple[str, bool]]) -> dict[str, int]:
    """Split code of each scene, given as (id, is labelled) in ascending order of ids.

    Without lists only labelled scenes are drawn from; the others are unlabelled training data.

    Raises:
        InputError: when a scene stands in no list or an unlabelled one is to test or validate.
    """
    lists = splits.scene
    if not lists.listed:
        labelled = [scene for scene, has_label in scenes if has_label]
        drawn = (
            dict(zip(labelled, draw(lists, splits.seed, len(labelled), "scenes").tolist(), strict=True))
            if labelled
            else {}
        )
        return {scene: drawn.get(scene, TRAIN) for scene, _ in scenes}
    codes: dict[str, int] = {}
    for scene, has_label in scenes:
        codes[scene] = _listed_split(lists, scene)
        if codes[scene] != TRAIN and not has_label:
            name = SPLITS[codes[scene]]
            raise InputError(
                f"scene {scene!r} stands in splits.scene.{name} but has no label: add its label or move it to train"
            )
    return codes


def _listed_split(lists: SceneLists, scene: str) -> int:
    for name in ("test", "val", "train"):
        if any(fnmatchcase(scene, pattern) for pattern in getattr(lists, name)):
            return SPLITS.index(name)
    raise InputError(f"scene {scene!r} stands in none of splits.scene.test, .val, .train: add it to one of them")


def idle_patterns(splits: Splits, scenes: Sequence[str]) -> list[str]:
    """Patterns of the scene lists that name no scene: perhaps a typing error, perhaps a partial download."""
    lists = splits.scene
    patterns = [*lists.test, *lists.val, *lists.train] if splits.protocol == "scene" else []
    return [pattern for pattern in patterns if not any(fnmatchcase(scene, pattern) for scene in scenes)]


def nested_order(seed: int, masks: Sequence[int], first: Sequence[int] = ()) -> npt.NDArray[np.int64]:
    """Order of the labelled training tiles (or scenes) whose prefixes are the labelled subsets.

    ``masks`` are their class bitmasks in the order of their keys. Those of ``first`` lead as they are listed. The rest
    is one seeded permutation, in which those that are the first to show some class are moved to its front (at most one
    a class), so that each prefix of at least that length has every class.
    """
    listed = np.array(list(first), dtype=np.int64)
    order = permutation(seed, _LABELLED_STREAM, len(masks))
    order = order[~np.isin(order, listed)]
    front: list[int] = []
    seen = 0
    for item in listed.tolist():
        seen |= masks[item]
    for item in order.tolist():
        if masks[item] & ~seen:
            front.append(item)
            seen |= masks[item]
    leading = np.array(front, dtype=np.int64)
    return np.concatenate([listed, leading, order[~np.isin(order, leading)]])


def ranks(
    seed: int,
    by: Literal["tile", "scene"],
    masks: Sequence[int],
    split_of: npt.NDArray[np.uint8],
    scene_of: npt.NDArray[np.uint32],
    first: Sequence[int] = (),
) -> npt.NDArray[np.uint32]:
    """Rank of each labelled training tile in the nested order, and UNRANKED elsewhere; rows ascend by key.

    By scene, scenes are ordered, and the tiles of a scene follow each other by key. ``first`` lists rows that lead; by
    scene, their scenes do. Rows of it that are not labelled or do not train count for nothing.
    """
    labelled = np.flatnonzero((split_of == TRAIN) & (np.array(masks, dtype=np.uint64) != 0))
    rank_of = np.full(len(masks), UNRANKED, dtype=np.uint32)
    place = {row: k for k, row in enumerate(labelled.tolist())}
    leading = [place[row] for row in first if row in place]
    own = [masks[i] for i in labelled.tolist()]
    if by == "tile":
        order = nested_order(seed, own, list(dict.fromkeys(leading)))
    else:
        scenes, scene = np.unique(scene_of[labelled], return_inverse=True)
        of_scene = [0] * len(scenes)
        for number, mask in zip(scene.tolist(), own, strict=True):
            of_scene[number] |= mask
        before = nested_order(seed, of_scene, list(dict.fromkeys(int(scene[k]) for k in leading)))
        turn = np.empty(len(scenes), dtype=np.int64)
        turn[before] = np.arange(len(scenes))
        order = np.argsort(turn[scene], kind="stable")
    rank_of[labelled[order]] = np.arange(len(labelled), dtype=np.uint32)
    return rank_of


def share_length(share: Fraction, by: str, scenes_in_order: npt.NDArray[np.uint32]) -> int:
    """How many labelled tiles a share takes, given the scene of each tile in the order of ranks.

    By tile ceil(share * tiles), by scene all tiles of the first ceil(share * scenes) scenes; exact, so that shares nest
    and none is empty.
    """
    total = len(scenes_in_order)
    if by == "tile" or not total:
        return share_count(share, total)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scenes_in_order.astype(np.int64)) != 0]))
    ends = np.append(starts[1:], total)
    return int(ends[share_count(share, len(starts)) - 1])
