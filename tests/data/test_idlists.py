from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from rasterio.transform import Affine

from shards.errors import InputError
from shards.index import Index, rebuild, tile_name
from shards.pack import Packed, pack
from tests.data import layouts

SCENES = ["2_10", "2_11", "3_10"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layouts.potsdam(tmp_path / "in", SCENES, 64, 64, unlabelled=["7_7"])
    return tmp_path / "in"


def write(root: Path, name: str, *lines: str) -> str:
    (root / name).write_text("\n".join(lines) + "\n")
    return name


def packed_with(root: Path, out: Path, *overrides: str) -> Packed:
    return pack(layouts.recipe("potsdam", "tile.size=32", *overrides), root, out)


def keys(packed: Packed, split: str) -> list[str]:
    index = Index.open(packed)
    return [tile_name(packed, index, row) for row in index.rows(split).tolist()]


def test_tiles_and_scenes_of_lists(root: Path, tmp_path: Path) -> None:
    write(root, "test.txt", "# published", "3_10   # a scene", "", "2_10_r00000_c00032")
    write(root, "val.txt", "2_10_r00032_c00000")
    lists = "splits.files={test: test.txt, val: val.txt, rest: train}"
    packed = packed_with(root, tmp_path / "set", "splits.protocol=files", lists)
    assert keys(packed, "test") == [
        "2_10_r00000_c00032",
        *(f"3_10_r{r:05d}_c{c:05d}" for r in (0, 32) for c in (0, 32)),
    ]
    assert keys(packed, "val") == ["2_10_r00032_c00000"]
    assert len(keys(packed, "train")) == 10
    # A changed list is another dataset.
    packed_with(root, tmp_path / "set", "splits.protocol=files", lists)
    write(root, "val.txt", "2_10_r00032_c00032")
    with pytest.raises(InputError, match=r"val\.txt is not as it was"):
        packed_with(root, tmp_path / "set", "splits.protocol=files", lists)


def test_what_no_list_names(root: Path, tmp_path: Path) -> None:
    write(root, "test.txt", "3_10")
    write(root, "train.txt", "2_10")
    for rest, train in (("drop", 4), ("train", 12)):
        lists = f"splits.files={{test: test.txt, train: train.txt, rest: {rest}}}"
        packed = packed_with(root, tmp_path / rest, "splits.protocol=files", lists)
        assert len(keys(packed, "train")) == train
        assert packed.report.left_out == 12 - train
    with pytest.raises(InputError, match=r"labelled tile '2_11_r00000_c00000' \(and 3 more\) stands in no list"):
        packed_with(root, tmp_path / "c", "splits.protocol=files", "splits.files={test: test.txt, train: train.txt}")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["3_1O"], r"test\.txt: '3_1O' is no tile and no scene of this dataset; did you mean '3_10'"),
        (["3_10", "3_10"], r"test\.txt: names '3_10' twice"),
        (["2_10_r00000_c00000", "3_10"], r"tile '2_10_r00000_c00000' also stands in"),
        (["7_7"], r"test\.txt: tile '7_7_r00000_c00000' has no label and cannot test or validate"),
    ],
)
def test_wrong_lists(root: Path, tmp_path: Path, lines: list[str], said: str) -> None:
    write(root, "test.txt", *lines)
    write(root, "train.txt", "2_10")
    lists = "splits.files={test: test.txt, train: train.txt, rest: train}"
    with pytest.raises(InputError, match=said):
        packed_with(root, tmp_path / "set", "splits.protocol=files", lists)
    assert not (tmp_path / "set/manifest.json").exists()


def test_a_missing_list(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: cannot be read as a list of ids"):
        packed_with(root, tmp_path / "set", "splits.protocol=files", "splits.files={test: none.txt, rest: train}")


def test_a_labelled_list_leads_and_the_index_can_be_rebuilt(root: Path, tmp_path: Path) -> None:
    write(root, "first.txt", "2_11_r00032_c00000", "2_10_r00000_c00000", "7_7")
    plain = packed_with(root, tmp_path / "plain", "splits.scene={train: ['*']}")
    packed = packed_with(root, tmp_path / "set", "splits.scene={train: ['*']}", "labelled.file=first.txt")
    index = Index.open(packed)
    rows = index.labelled_rows(Fraction(1)).tolist()
    assert [tile_name(packed, index, row) for row in rows[:2]] == ["2_11_r00032_c00000", "2_10_r00000_c00000"]
    assert sorted(rows) == sorted(Index.open(plain).labelled_rows(Fraction(1)).tolist())
    assert np.array_equal(rebuild(packed)["labelled_rank"], index.labelled_rank)


def test_shares_by_scene_in_a_dataset(root: Path, tmp_path: Path) -> None:
    packed = packed_with(
        root, tmp_path / "set", "splits.scene={train: ['*']}", "labelled.by=scene", "labelled.shares=[1/3, 2/3, 1]"
    )
    index = Index.open(packed)
    assert packed.manifest.labelled.by == "scene"
    assert packed.manifest.labelled.shares == {"1/3": 4, "2/3": 8, "1": 12}
    for third in (1, 2, 3):
        rows = index.labelled_rows(Fraction(third, 3))
        assert len(set(index.scene[rows].tolist())) == third
        assert len(rows) == 4 * third
    assert np.array_equal(rebuild(packed)["labelled_rank"], index.labelled_rank)


def test_scenes_of_one_place_in_different_splits_are_named(tmp_path: Path) -> None:
    ids = layouts.random_ids(6, 64, 64, 0)
    for number, (scene, east) in enumerate([("2_10", 0.0), ("2_11", 32.0), ("3_10", 640.0)]):
        options = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 400000 + east, 0, -0.5, 5800000)}
        image = tmp_path / f"in/top_potsdam_{scene}_RGB.tif"
        layouts.write_tiff(image, layouts.random_image(3, 64, 64, number), **options)
        layouts.write_tiff(
            tmp_path / f"in/top_potsdam_{scene}_label.tif", layouts.colored(ids, layouts.ISPRS), **options
        )
    apart = packed_with(tmp_path / "in", tmp_path / "a", "splits.scene={train: ['2_1*'], test: ['3_10']}")
    assert apart.report.overlaps == []
    near = packed_with(tmp_path / "in", tmp_path / "b", "splits.scene={train: ['2_10', '3_10'], test: ['2_11']}")
    assert near.report.overlaps == [], "neighbours that touch are no leak"
    moved = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 400016, 0, -0.5, 5800000)}
    layouts.write_tiff(tmp_path / "in/top_potsdam_2_11_RGB.tif", layouts.random_image(3, 64, 64, 1), **moved)
    layouts.write_tiff(tmp_path / "in/top_potsdam_2_11_label.tif", layouts.colored(ids, layouts.ISPRS), **moved)
    leaking = packed_with(tmp_path / "in", tmp_path / "c", "splits.scene={train: ['2_10', '3_10'], test: ['2_11']}")
    assert leaking.report.overlaps == [("2_10", "2_11")]
    assert any("1 pairs of scenes show the same ground" in line for line in leaking.report.lines())
