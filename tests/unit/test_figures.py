"""Pictures say what the arrays say: colours, hatching, stretch, layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from dctc.tracking.figures import confusion_picture, panel, reliability_picture, save_picture, stretch
from shards.manifest import ClassInfo

CLASSES = [ClassInfo(name="road", color=(200, 0, 0)), ClassInfo(name="tree", color=(0, 200, 0))]


def cell(picture: Image.Image, row: int, column: int, size: int = 64) -> np.ndarray:
    """The pixels of one cell of a panel without row captions."""
    x, y = 14 + column * (size + 6), 42 + row * (size + 6)
    return np.asarray(picture)[y : y + size, x : x + size]


def test_panel_shows_classes_ignore_and_nodata() -> None:
    labels = np.zeros((2, 64, 64), np.uint8)
    labels[0, :, 32:] = 1
    labels[1, :32] = 255
    valid = np.ones((2, 64, 64), bool)
    valid[1, :, :8] = False
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64), dtype=np.uint8)
    picture = panel(
        {"image": images, "label": labels, "S1": labels.astype(np.int64) % 255}, CLASSES, valid=valid, cell=64
    )
    first, second, predicted = cell(picture, 0, 1), cell(picture, 1, 1), cell(picture, 1, 2)
    assert (first[:, :32] == (200, 0, 0)).all()
    assert (first[:, 32:] == (0, 200, 0)).all()
    assert (second[32:, 8:] == (200, 0, 0)).all()
    grey = {(236, 236, 236), (208, 208, 208)}
    assert {tuple(p) for p in second[:32].reshape(-1, 3).tolist()} == grey
    assert {tuple(p) for p in predicted[:, :8].reshape(-1, 3).tolist()} == grey
    assert (predicted[:, 8:] == (200, 0, 0)).all()
    assert {tuple(p) for p in cell(picture, 1, 0)[:, :8].reshape(-1, 3).tolist()} == grey


def test_panel_entropy_grows_brighter_and_is_comparable_between_pictures() -> None:
    nats = np.zeros((1, 64, 64), np.float32)
    nats[:, 32:] = np.log(2)
    low, high = cell(panel({"entropy": nats}, CLASSES, cell=64), 0, 0)[[0, -1], 0].astype(int)
    half = cell(panel({"entropy": nats / 2}, CLASSES, cell=64), 0, 0)[-1, 0].astype(int)
    assert low.sum() < half.sum() < high.sum()


def test_panel_layout_follows_the_data() -> None:
    images = np.zeros((3, 1, 20, 40), np.float32)
    one = panel({"image": images}, CLASSES, cell=100)
    two = panel({"image": images, "again": images}, CLASSES, cell=100)
    captions = panel({"image": images, "again": images}, CLASSES, cell=100, rows=["a", "b" * 200, ""])
    assert two.width - one.width == 106
    assert captions.width > two.width
    assert panel({"image": images[:2], "again": images[:2]}, CLASSES, cell=100).height == two.height - 56


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "at least one column"),
        ({"label": np.full((1, 4, 4), 2)}, r"outside 0\.\.1"),
        ({"label": np.zeros((4, 4), int)}, "must be"),
        ({"a": np.zeros((1, 4, 4), int), "b": np.zeros((2, 4, 4), int)}, "differ in shape"),
    ],
)
def test_panel_refuses_what_it_cannot_show(columns: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        panel(columns, CLASSES)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
def test_stretch_takes_any_bands_and_types(dtype: str, bands: int) -> None:
    images = np.random.default_rng(1).integers(0, 200, (2, bands, 8, 8)).astype(dtype)
    shown = stretch(images)
    assert shown.shape == (2, 8, 8, 3)
    assert shown.dtype == np.uint8
    assert (shown.min(), shown.max()) == (0, 255)
    if bands < 3:
        assert (shown[..., 0] == shown[..., 2]).all()


def test_stretch_looks_at_valid_pixels_alone_and_at_all_tiles_together() -> None:
    images = np.zeros((2, 1, 2, 100))
    images[0], images[1] = np.linspace(0, 50, 100), np.linspace(50, 100, 100)
    images[0, 0, 1] = 1e6
    images[1, 0, 1] = np.nan
    valid = np.ones((2, 2, 100), bool)
    valid[0, 1] = False
    shown = stretch(images, valid, percentiles=(0, 100))
    assert shown[0, 0, :, 0].max() <= shown[1, 0, :, 0].min()
    assert (shown[0, 0, 0, 0], shown[1, 0, -1, 0]) == (0, 255)


def test_stretch_with_given_limits_and_constant_bands() -> None:
    assert stretch(np.full((1, 1, 1, 1), 30), limits=[(10, 50)])[0, 0, 0, 0] == 128
    assert (stretch(np.full((1, 3, 2, 2), 7)) == 128).all()


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int16, (1, 1, 4, 4)), st.floats(0.5, 100), st.floats(-1000, 1000))
def test_stretch_ignores_gain_and_offset(values: np.ndarray, gain: float, offset: float) -> None:
    plain = stretch(values, percentiles=(0, 100)).astype(int)
    moved = stretch(values * gain + offset, percentiles=(0, 100)).astype(int)
    assert np.abs(plain - moved).max() <= 1


def test_confusion_picture_darkens_with_the_share_of_the_row() -> None:
    matrix = np.array([[900_000_000, 100_000_000], [0, 7]])
    picture = np.asarray(confusion_picture(matrix, ["road", "tree"], "test").convert("L")).astype(int)
    swapped = np.asarray(confusion_picture(matrix[:, ::-1], ["road", "tree"], "test").convert("L")).astype(int)
    assert picture.shape == swapped.shape
    middle = picture.shape[1] // 2
    assert (picture != swapped)[:, :middle].any()
    rows = slice(picture.shape[0] // 5, picture.shape[0] // 3)
    assert np.median(picture[rows, middle // 2 : middle]) < np.median(swapped[rows, middle // 2 : middle]) - 50


def near(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """bool [H,W]: where a picture [H,W,3] has nearly that colour."""
    return np.asarray((np.abs(picture.astype(int) - color) < 30).all(axis=2))


def bins(accuracy: float, full: range = range(5, 15)) -> list[list[object]]:
    """Of 15 bins those of ``full`` have pixels, of which ``accuracy`` are right."""
    middle = [(number + 0.5) / 15 for number in range(15)]
    return [[n / 15, (n + 1) / 15, 10 if n in full else 0, *((middle[n], accuracy) if n in full else ("", ""))]
            for n in range(15)]  # fmt: skip


def test_reliability_picture_shows_each_curve_at_its_accuracy() -> None:
    """Of a flat curve the rows of its colour lie as high as its accuracy says; an empty bin is no obstacle."""

    def height(accuracy: float) -> float:
        picture = np.asarray(reliability_picture({"one": bins(accuracy)}, "test")).astype(int)
        blue = near(picture, (0x08, 0x51, 0x9C))
        blue = blue[: len(blue) * 2 // 3, picture.shape[1] // 2 :]  # the diagram above, right of the legend
        return float(np.median(np.nonzero(blue)[0]))

    low, middle, high = height(0.2), height(0.5), height(0.8)
    assert low > middle > high
    assert low - middle == pytest.approx(middle - high, abs=4)
    alone = np.asarray(reliability_picture({"one": bins(0.5)}))
    both = np.asarray(reliability_picture({"one": bins(0.5), "two": bins(0.2)}))
    assert near(both, (0xE6, 0x55, 0x0D)).sum() > 100
    assert not near(alone, (0xE6, 0x55, 0x0D)).any()
    reliability_picture({"nothing": bins(0.5, full=range(0))})


@pytest.mark.parametrize("size", [1, 12, 30])
def test_confusion_picture_of_any_size_with_an_absent_class(size: int, tmp_path: Path) -> None:
    matrix = np.diag(np.arange(size)).astype(np.int64)  # class 0 has no pixel
    path = save_picture(confusion_picture(matrix, [f"class {i}" for i in range(size)]), tmp_path / "new" / "cm.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 150
    assert [p.name for p in path.parent.iterdir()] == ["cm.png"]
