"""Damage of every kind is found and named, and what can be made good from the shards is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dctc.data.tiles import TileDataset
from shards.errors import InputError
from shards.index import COLUMNS, Index
from shards.manifest import Dataset
from shards.pack import Packed
from shards.verify import rebuild_index, verify
from tests.tiny import run


@pytest.fixture
def own(packed: Packed, tmp_path: Path) -> Dataset:
    """A copy to damage."""
    return Dataset.open(shutil.copytree(packed.root, tmp_path / "own"))


@pytest.mark.parametrize("column", ["image_offset", "labelled_rank", "mask_size"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_lost_index_is_written_again_from_the_shards(own: Dataset, column: str, harm: str) -> None:
    path = own.root / "index" / f"{column}.npy"
    before = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        data = bytearray(before)
        data[-1] ^= 1
        path.write_bytes(bytes(data) if harm == "flip" else before[:-3])
    assert any(column in damage for damage in verify(own.root))
    with pytest.raises(InputError, match=rf"{column}\.npy"):
        Index.open(own)
    assert rebuild_index(own.root) == [column]
    assert path.read_bytes() == before
    assert verify(own.root) == []


def test_the_whole_index_by_the_command(own: Dataset) -> None:
    shutil.rmtree(own.root / "index")
    done = run("dctc", "verify", own.root, "--rebuild-index")
    assert f"index columns written again: {', '.join(COLUMNS)}" in done.stdout
    assert "sound" in done.stdout
    again = run("dctc", "verify", own.root, "--rebuild-index")
    assert "none was damaged" in again.stdout


def test_damaged_shards_do_not_make_an_index(own: Dataset) -> None:
    shard = own.root / own.manifest.shards[0].name
    data = bytearray(shard.read_bytes())
    offset = int(Index.open(own).image_offset[int(np.flatnonzero(Index.open(own).shard == 0)[0])])
    data[offset + 40] ^= 1
    shard.write_bytes(bytes(data))
    (own.root / "index/scene.npy").unlink()
    done = run("dctc", "verify", own.root, "--rebuild-index", check=False)
    assert done.returncode == 2
    assert "the shards do not give the index of the manifest (column image_crc32 differs)" in done.stderr
    assert not (own.root / "index/scene.npy").exists()


def test_a_shard_replaced_by_another_of_the_same_name(own: Dataset) -> None:
    first, second = (own.root / own.manifest.shards[k].name for k in (0, 1))
    data = second.read_bytes()
    second.write_bytes(first.read_bytes())
    (damage,) = verify(own.root)
    assert str(second) in damage
    index = Index.open(own)
    tiles = TileDataset(own, labels=True)
    rows = np.flatnonzero(index.shard == 1).tolist()
    with pytest.raises(InputError, match="is damaged"):
        tiles.__getitems__([(0, row) for row in rows])
    second.write_bytes(data)
    assert verify(own.root) == []


def test_files_that_do_not_belong(own: Dataset) -> None:
    shutil.copy(own.root / own.manifest.shards[0].name, own.root / "shards/train-000099.tar")
    (damage,) = verify(own.root)
    assert "train-000099.tar: does not belong to the dataset" in damage
    done = run("dctc", "verify", own.root, check=False)
    assert done.returncode == 1
