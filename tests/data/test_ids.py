from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shards.errors import InputError
from shards.inputs import Ids
from shards.labels import IGNORE_VALUE, LABEL_NODATA, UNMATCHED, IdsDecoder
from shards.sections import ClassColor
from tests.data import layouts
from tests.data.own import generic, labels, packed_from
from tests.data.real import fates

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

CLASSES = [ClassColor(name=name, color=(k, 0, 0)) for k, name in enumerate("abc")]


def decoder(tagged: float | None = None, **settings: Any) -> IdsDecoder:
    return IdsDecoder(Ids.model_validate({"pattern": "(?P<a>.)", "kind": "ids"} | settings), CLASSES, tagged)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float32", "float64"])
def test_numbers_of_every_type(dtype: str) -> None:
    numbers = np.array([[0, 1, 2, 3, 99]]).astype(dtype)
    assert decoder().decode(numbers).tolist() == [[0, 1, 2, UNMATCHED, UNMATCHED]]
    mapped = decoder(map={99: "c", 1: "a", 0: "ignore", -7: "b"})
    assert mapped.decode(numbers).tolist() == [[IGNORE_VALUE, 0, UNMATCHED, UNMATCHED, 2]]
    assert (mapped.unmatched, mapped.pixels, mapped.unknown_values()) == (2, 5, [("2", 1), ("3", 1)])


def test_floats_that_hold_no_integer_are_unknown_and_nan_is_no_label() -> None:
    found = decoder()
    codes = found.decode(np.array([[1.0, 1.5, np.nan, np.inf, -1.0]], dtype=np.float32))
    assert codes.tolist() == [[1, UNMATCHED, LABEL_NODATA, UNMATCHED, UNMATCHED]]
    assert (found.pixels, found.unmatched) == (4, 3)


@pytest.mark.parametrize(
    ("tagged", "given", "expected"),
    [
        (0, {}, [LABEL_NODATA, 1, 2]),  # the file says that its zeros are no labels
        (0, {"map": {0: "a", 1: "b", 2: "c"}}, [0, 1, 2]),  # the recipe knows better
        (0, {"map": {1: "b", 2: "c"}}, [LABEL_NODATA, 1, 2]),
        (0, {"nodata": 2}, [0, 1, LABEL_NODATA]),
        (-99999.0, {}, [0, 1, 2]),
        (float("nan"), {}, [0, 1, 2]),
    ],
)
def test_nodata_of_the_file_and_of_the_recipe(tagged: float, given: dict[str, Any], expected: list[int]) -> None:
    assert decoder(tagged, **given).decode(np.array([[0, 1, 2]], dtype=np.uint8)).tolist() == [expected]


def test_a_number_cannot_be_mapped_and_nodata() -> None:
    with pytest.raises(ValidationError, match="1 stands in map and is nodata"):
        decoder(map={1: "a"}, nodata=1)


@settings(max_examples=40, deadline=None)
@given(
    names=st.dictionaries(st.integers(-300, 300), st.sampled_from(["a", "b", "c", "ignore"]), max_size=6),
    dtype=st.sampled_from(["int16", "uint8", "float32"]),
    nodata=st.none() | st.integers(301, 310),
    seed=st.integers(0, 1000),
)
def test_against_a_plain_look_up(names: dict[int, str], dtype: str, nodata: int | None, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0 if dtype == "uint8" else -311, 255, (7, 9)).astype(dtype)
    found = decoder(map=names, nodata=nodata)
    codes = found.decode(numbers)
    unknown: dict[int, int] = {}
    for number, code in zip(numbers.ravel().tolist(), codes.ravel().tolist(), strict=True):
        name = names.get(int(number))
        if name is None:
            assert code == UNMATCHED
            unknown[int(number)] = unknown.get(int(number), 0) + 1
        else:
            assert code == (IGNORE_VALUE if name == "ignore" else "abc".index(name))
    ranked = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))[:5]
    assert found.unknown_values() == [(str(number), count) for number, count in ranked]


def test_measurements_instead_of_classes_do_not_fill_the_memory() -> None:
    found = decoder()
    often = np.full((1, 50), 77777.5)
    for start in range(0, 300_000, 100_000):
        found.decode(np.concatenate([often, np.arange(start, start + 100_000)[None] + 0.25], axis=1))
    assert found.unmatched == 300_150
    assert found.unknown_values(1) == [("77777.5", 150)]
    assert len(found._unknown) <= 2 * 65536


IDS = {"kind": "ids", "pattern": r"labels/(?P<scene>[^/]+)\.tif"}


def test_from_files_to_labels(tmp_path: Path) -> None:
    ids = layouts.random_ids(4, 50, 70, 0)
    numbers = np.array([10, 20, 30, 255], dtype=np.uint8)[ids]
    layouts.write_tiff(tmp_path / "in/images/x.tif", layouts.random_image(3, 50, 70, 0))
    layouts.write_tiff(tmp_path / "in/labels/x.tif", numbers[None], nodata=255)
    label = IDS | {"map": {10: "a", 20: "b", 30: "ignore"}}
    packed = packed_from(generic(label=label), tmp_path / "in", tmp_path)
    found = labels(packed, 50, 70)["x"]
    assert np.array_equal(found, np.where(ids < 2, ids, 255))
    assert packed.manifest.splits["train"].pixels == [int((ids == 0).sum()), int((ids == 1).sum())]
    assert fates(packed) == {
        "ignore_value": int((ids == 2).sum()),
        "label_nodata": int((ids == 3).sum()),
        "padding": 6 * 32 * 32 - 50 * 70,
    }


def test_unknown_numbers_are_reported_and_too_many_stop(tmp_path: Path) -> None:
    ids = np.zeros((32, 64), dtype=np.int16)
    ids[0, :3], ids[1, :2] = -4, 300
    layouts.write_tiff(tmp_path / "in/images/x.tif", layouts.random_image(3, 32, 64, 0))
    layouts.write_tiff(tmp_path / "in/labels/x.tif", ids[None])
    packed = packed_from(generic(label=IDS), tmp_path / "in", tmp_path)
    assert fates(packed) == {"unmatched": 5}
    (scene,) = packed.report.unmatched
    assert (scene.count, scene.counted, scene.values) == (5, "pixels", [("-4", 3), ("300", 2)])
    assert any("scene x: 5 label pixels (0.244%)" in line and "-4 (3), 300 (2)" in line for line in _lines(packed))
    assert any("warning: no training tile has a pixel of b" in line for line in _lines(packed))
    with pytest.raises(InputError, match=r"labels/x\.tif: 0\.24% of the label pixels have numbers .*: -4 \(3 px\)"):
        packed_from(generic(label=IDS | {"max_unmatched_share": 0.002}), tmp_path / "in", tmp_path / "b")


def _lines(packed: Any) -> list[str]:
    lines: list[str] = packed.report.lines()
    return lines


def test_labels_of_the_wrong_kind(tmp_path: Path) -> None:
    layouts.write_tiff(tmp_path / "in/images/x.tif", layouts.random_image(3, 32, 32, 0))
    layouts.write_tiff(tmp_path / "in/labels/x.tif", layouts.random_image(3, 32, 32, 0))
    with pytest.raises(InputError, match=r"labels/x\.tif: label kind ids needs one band of numbers, not 3 of uint8"):
        packed_from(generic(label=IDS), tmp_path / "in", tmp_path)
