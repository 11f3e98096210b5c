"""The shipped recipes on files in the layouts in which their data are published, with what lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from shards.errors import InputError
from shards.report import read_plan
from tests.data import layouts
from tests.data.own import labels, packed_from
from tests.data.real import fates, whole

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

NO_BOUNDARY = {
    "potsdam": r"label.pattern=(?:.*/)?top_potsdam_(?P<scene>\d+_\d+)_label_noBoundary\.tif",
    "vaihingen": r"label.pattern=(?:.*/)?(?!top/)[^/]+/top_mosaic_09cm_area(?P<area>\d+)_noBoundary\.tif",
}


def eroded(ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Class ids whose borders between classes are 255."""
    thin = ids.copy()
    differs = ids[:, 1:] != ids[:, :-1]
    thin[:, 1:][differs] = 255
    thin[:, :-1][differs] = 255
    return thin


@pytest.fixture(scope="module")
def potsdam(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All three kinds of images, both kinds of labels and the elevation models in one folder."""
    root = tmp_path_factory.mktemp("potsdam")
    scenes = ["2_10", "7_13"]
    for bands in ("RGB", "IRRG", "RGBIR"):
        truth = layouts.potsdam(root, scenes, 100, 90, bands)
    for number, scene in enumerate(scenes):
        thin = root / "5_Labels_all_noBoundary" / f"top_potsdam_{scene}_label_noBoundary.tif"
        layouts.write_tiff(thin, layouts.colored(eroded(truth[scene]), layouts.ISPRS))
        layouts.write_tfw(thin.with_suffix(".tfw"), (366676.0 + 300 * number, 5808000.0))
        row, col = scene.split("_")
        model = root / "1_DSM" / f"dsm_potsdam_{int(row):02d}_{int(col):02d}.tif"
        layouts.write_tiff(model, layouts.random_image(1, 100, 90, 0, "float32"))
    return root, truth


@pytest.mark.parametrize(
    ("name", "bands", "folder"),
    [
        ("potsdam", ["red", "green", "blue"], "2_Ortho_RGB"),
        ("potsdam_irrg", ["nir", "red", "green"], "2_Ortho_IRRG"),
        ("potsdam_rgbir", ["red", "green", "blue", "nir"], "2_Ortho_RGBIR"),
    ],
)
@pytest.mark.parametrize("boundary", [True, False])
def test_potsdam(
    potsdam: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, bands: list[str], folder: str, boundary: bool
) -> None:
    root, truth = potsdam
    overrides = [] if boundary else [NO_BOUNDARY["potsdam"]]
    packed = packed_from(layouts.recipe(name, *overrides), root, tmp_path)
    assert [band.name for band in packed.manifest.bands] == bands
    assert packed.manifest.scenes == ["2_10", "7_13"]
    assert packed.report.unlabelled_scenes == 0
    assert [packed.manifest.splits[split].scenes for split in ("train", "test")] == [1, 1]
    found = labels(packed, 100, 90)
    for scene, ids in truth.items():
        assert np.array_equal(found[scene], ids if boundary else eroded(ids))
    black = 0 if boundary else int((eroded(truth["2_10"]) == 255).sum())
    assert fates(packed).get("ignore_value", 0) == black
    image, valid = whole(packed, "7_13", 100, 90)
    assert valid.all()
    assert np.array_equal(image, layouts.random_image(len(bands), 100, 90, 1))
    inputs = [entry["path"] for entry in read_plan(packed)["scenes"][0]["inputs"]]
    image_file = f"{folder}/top_potsdam_2_10_{folder.split('_')[-1]}"
    ending = "" if boundary else "_noBoundary"
    label_file = f"5_Labels_all{ending}/top_potsdam_2_10_label{ending}"
    assert inputs == [f"{image_file}.tif", f"{image_file}.tfw", f"{label_file}.tif", f"{label_file}.tfw"]


def test_the_template_in_the_recipes_is_the_one_that_is_tested() -> None:
    for name in ("potsdam", "potsdam_irrg", "potsdam_rgbir", "vaihingen"):
        text = (layouts.RECIPES / f"{name}.yaml").read_text()
        assert f"'{NO_BOUNDARY[name.split('_')[0]]}'" in text


def test_a_pattern_that_takes_both_kinds_of_labels_is_refused(
    potsdam: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    both = r"label.pattern=(?:.*/)?top_potsdam_(?P<scene>\d+_\d+)_label.*\.tif"
    with pytest.raises(InputError, match=r"scene '2_10' has two labels, 5_Labels_all/.* and 5_Labels_all_noBoundary/"):
        packed_from(layouts.recipe("potsdam", both), potsdam[0], tmp_path)


@pytest.mark.parametrize("boundary", [True, False])
def test_vaihingen(tmp_path: Path, boundary: bool) -> None:
    root = tmp_path / "in"
    truth = layouts.vaihingen(root, {1: (80, 70), 2: (64, 64)})
    for area, ids in truth.items():
        name = f"top_mosaic_09cm_area{area}_noBoundary.tif"
        layouts.write_tiff(root / "gts_eroded" / name, layouts.colored(eroded(ids), layouts.ISPRS))
        model = layouts.random_image(1, ids.shape[0], ids.shape[1], 0, "float32")
        layouts.write_tiff(root / "dsm" / f"dsm_09cm_matching_area{area}.tif", model)
    overrides = [] if boundary else [NO_BOUNDARY["vaihingen"]]
    packed = packed_from(layouts.recipe("vaihingen", *overrides), root, tmp_path)
    assert packed.manifest.scenes == ["area1", "area2"]
    assert [band.name for band in packed.manifest.bands] == ["nir", "red", "green"]
    for split, area in (("train", 1), ("test", 2)):
        ids = truth[area] if boundary else eroded(truth[area])
        assert packed.manifest.splits[split].pixels == [int((ids == k).sum()) for k in range(6)]
        assert fates(packed, split).get("ignore_value", 0) == int((ids == 255).sum())


def test_gid15(tmp_path: Path) -> None:
    truth = layouts.gid(tmp_path / "in", 5, 64, 128, fine=True)
    packed = packed_from(layouts.recipe("gid15"), tmp_path / "in", tmp_path)
    found = labels(packed, 64, 128)
    for scene, ids in truth.items():
        assert np.array_equal(found[scene], ids)
    total = np.sum([info.pixels for info in packed.manifest.splits.values()], axis=0)
    assert total.tolist() == [sum(int((ids == k).sum()) for ids in truth.values()) for k in range(15)]


def test_five_classes_of_gid_are_not_taken_for_fifteen(tmp_path: Path) -> None:
    layouts.gid(tmp_path / "in", 5, 64, 128)
    with pytest.raises(InputError, match=r"of the label pixels have colours that the recipe does not know"):
        packed_from(layouts.recipe("gid15"), tmp_path / "in", tmp_path)


def test_loveda(tmp_path: Path) -> None:
    truth = layouts.loveda(tmp_path / "in", {"Train": [0, 1, 1366], "Val": [2522, 2523], "Test": [4191, 4192]})
    packed = packed_from(layouts.recipe("loveda"), tmp_path / "in", tmp_path)
    manifest = packed.manifest
    assert {name: (info.scenes, info.tiles) for name, info in manifest.splits.items()} == {
        "train": (5, 20),
        "val": (0, 0),
        "test": (2, 8),
    }
    assert packed.report.unlabelled_scenes == 2
    assert "Train_Urban_1" in manifest.scenes
    found = labels(packed, 80, 80)
    for scene, mask in truth.items():
        assert np.array_equal(found[scene], np.where(mask == 0, 255, mask - 1).astype(np.uint8))
    trained = [mask for scene, mask in truth.items() if scene.startswith("Train")]
    assert fates(packed)["ignore_value"] == sum(int((mask == 0).sum()) for mask in trained)


def test_loveda_masks_with_other_numbers_stop(tmp_path: Path) -> None:
    layouts.loveda(tmp_path / "in", {"Train": [0, 1], "Val": [2522]})
    path = tmp_path / "in/Train/Rural/masks_png/0.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[0, 0] = 8
    Image.fromarray(mask).save(path)
    with pytest.raises(InputError, match=r"masks_png/0\.png: 0\.02% of the label pixels have numbers .*: 8 \(1 px\)"):
        packed_from(layouts.recipe("loveda"), tmp_path / "in", tmp_path)
