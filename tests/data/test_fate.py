"""Every pixel's fate is counted: of a class, or ignored for one reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.index import Index
from shards.tiles import read_tile
from tests.data import layouts
from tests.data.own import generic, labels, packed_from, write_png
from tests.data.real import fates

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

IDS = {"kind": "ids", "pattern": r"labels/(?P<scene>[^/]+)\.tif", "map": {0: "a", 1: "b", 2: "ignore"}}
MASK = {"pattern": r"masks/(?P<scene>[^/]+)\.png"}


def write_scene(root: Path, name: str, numbers: Any, holes: Any, aside: Any | None) -> None:
    """``numbers`` [H,W] are the label, ``holes`` image pixels without data, ``aside`` what a mask file sets aside."""
    image = layouts.random_image(3, numbers.shape[0], numbers.shape[1], 0)
    image[:, holes] = 0
    layouts.write_tiff(root / f"images/{name}.tif", image, nodata=0)
    layouts.write_tiff(root / f"labels/{name}.tif", numbers[None].astype(np.uint8), nodata=3)
    if aside is not None:
        write_png(root / f"masks/{name}.png", np.stack([~aside] * 3).astype(np.uint8) * 255, "L")


def expected_fates(numbers: Any, holes: Any, aside: Any, kept: Any) -> dict[str, int]:
    """By hand: the image's holes first, then the mask, then what the label says; ``kept`` are pixels of kept tiles."""
    counts = {
        "image_nodata": kept & holes,
        "mask": kept & aside & ~holes,
        "ignore_value": kept & (numbers == 2) & ~aside & ~holes,
        "label_nodata": kept & (numbers == 3) & ~aside & ~holes,
        "unmatched": kept & (numbers == 4) & ~aside & ~holes,
    }
    return {reason: int(where.sum()) for reason, where in counts.items() if where.any()}


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    applies=st.sampled_from(["label", "image"]),
    seed=st.integers(0, 10_000),
    edge=st.sampled_from(["pad", "shift"]),
    stride=st.sampled_from([16, 11]),
)
def test_counts_add_up_whatever_the_files_hold(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, applies: str, seed: int, edge: str, stride: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("fate")
    generator = np.random.default_rng(seed)
    numbers = generator.integers(0, 5, (height, width))
    holes, aside = generator.random((2, height, width)) < 0.2
    holes[0, 0] = aside[0, 0] = False  # something to train on
    holes[: height // 2] |= generator.random() < 0.3
    holes[0, 0] = False
    write_scene(tmp_path / "in", "x", numbers, holes, aside)
    recipe = generic(
        label=IDS | {"max_unmatched_share": 1},
        mask=MASK | {"applies_to": applies},
        tile={"size": 16, "stride": stride, "edge": edge},
    )
    packed = packed_from(recipe, tmp_path / "in", tmp_path)
    found = fates(packed)  # checks the sum
    index = Index.open(packed)
    total = {"padding": 0, "a": 0, "b": 0}
    for row in range(len(index)):
        window = read_tile(packed, index, row).meta["window"]
        inside = np.zeros((height, width), dtype=bool)
        inside[window["row"] : window["row"] + 16, window["col"] : window["col"] + 16] = True
        for reason, count in expected_fates(numbers, holes, aside, inside).items():
            total[reason] = total.get(reason, 0) + count
        total["padding"] += 256 - int(inside.sum())
        for place, name in enumerate("ab"):
            total[name] += int((inside & (numbers == place) & ~aside & ~holes).sum())
    assert packed.manifest.splits["train"].pixels == [total.pop("a"), total.pop("b")]
    assert found == {reason: count for reason, count in total.items() if count}


@pytest.mark.parametrize("applies", ["label", "image"])
@pytest.mark.parametrize("ignore", ["zero", "nonzero"])
def test_masks_hide_labels_or_pixels(tmp_path: Path, applies: str, ignore: str) -> None:
    aside = np.zeros((32, 64), dtype=bool)
    aside[:10, :20] = True
    ids = layouts.random_ids(2, 32, 64, 0)
    drawn = aside if ignore == "zero" else ~aside
    write_scene(tmp_path / "in", "x", ids, np.zeros_like(aside), drawn)
    write_scene(tmp_path / "in", "y", ids, np.zeros_like(aside), None)  # a scene without a mask file
    mask = MASK | {"ignore": ignore, "applies_to": applies}
    packed = packed_from(generic(label=IDS, mask=mask), tmp_path / "in", tmp_path)
    found = labels(packed, 32, 64)
    assert np.array_equal(found["x"], np.where(aside, 255, ids))
    assert np.array_equal(found["y"], ids)
    assert fates(packed) == {"mask": 200}
    index = Index.open(packed)
    tile = read_tile(packed, index, 0)
    hidden = aside[:, :32] if applies == "image" else np.zeros((32, 32), dtype=bool)
    assert np.array_equal(tile.valid, ~hidden)
    assert ((tile.image == 0).all(axis=0) == hidden).all()


def test_masks_hide_pixels_of_unlabelled_scenes_too(tmp_path: Path) -> None:
    aside = np.zeros((32, 32), dtype=bool)
    aside[5:] = True
    write_scene(tmp_path / "in", "x", np.zeros((32, 32)), ~aside & False, aside)
    mask = MASK | {"applies_to": "image"}
    packed = packed_from(generic(label=None, classes=[], mask=mask), tmp_path / "in", tmp_path)
    assert np.array_equal(read_tile(packed, Index.open(packed), 0).valid, ~aside)


def test_wrong_masks(tmp_path: Path) -> None:
    empty = np.zeros((32, 32), dtype=bool)
    write_scene(tmp_path / "in", "x", np.zeros((32, 32)), empty, None)
    recipe = generic(label=IDS, mask=MASK)
    with pytest.raises(InputError, match="no file matches the mask pattern"):
        packed_from(recipe, tmp_path / "in", tmp_path)
    write_png(tmp_path / "in/masks/x.png", np.zeros((3, 20, 32), dtype=np.uint8), "L")
    with pytest.raises(InputError, match=r"masks/x\.png: mask of 32 x 20 pixels that do not lie on the grid"):
        packed_from(recipe, tmp_path / "in", tmp_path)
    write_png(tmp_path / "in/masks/x.png", np.zeros((3, 32, 32), dtype=np.uint8))
    with pytest.raises(InputError, match=r"masks/x\.png: a mask needs one band, not 3"):
        packed_from(recipe, tmp_path / "in", tmp_path)
    write_png(tmp_path / "in/masks/z.png", np.zeros((3, 32, 32), dtype=np.uint8), "L")
    with pytest.raises(InputError, match=r"masks/z\.png: mask of scene 'z' without its image"):
        packed_from(recipe, tmp_path / "in", tmp_path)


def test_a_colour_mask_whose_nodata_value_is_no_class(tmp_path: Path) -> None:
    """Black by the file's own word; a class that is black in the recipe stays one."""
    colors = np.zeros((3, 32, 32), dtype=np.uint8)
    colors[:, 8:] = np.array([10, 20, 30]).reshape(3, 1, 1)
    layouts.write_tiff(tmp_path / "in/images/x.tif", layouts.random_image(3, 32, 32, 0))
    layouts.write_tiff(tmp_path / "in/labels/x.tif", colors, nodata=0)
    label = {"pattern": r"labels/(?P<scene>[^/]+)\.tif"}
    packed = packed_from(generic(label=label), tmp_path / "in", tmp_path)
    assert fates(packed) == {"label_nodata": 8 * 32}
    black = [{"name": "a", "color": [10, 20, 30]}, {"name": "b", "color": [0, 0, 0]}]
    packed = packed_from(generic(label=label, classes=black), tmp_path / "in", tmp_path / "b")
    assert packed.manifest.splits["train"].pixels == [24 * 32, 8 * 32]
