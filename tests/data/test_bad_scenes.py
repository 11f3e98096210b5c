from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rasterio.transform import Affine

from shards.errors import InputError
from shards.manifest import Dataset
from shards.pack import pack
from tests.data import layouts
from tests.data.own import generic, write_png

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

IMAGE = "2_Ortho_RGB/top_potsdam_2_10_RGB.tif"
LABEL = "5_Labels_all/top_potsdam_2_10_label.tif"


def small_image(root: Path) -> None:
    layouts.write_tiff(root / IMAGE, layouts.random_image(3, 100, 200, 0))


def orphan(root: Path) -> None:
    (root / IMAGE).unlink()


def truncated(root: Path) -> None:
    data = (root / IMAGE).read_bytes()
    (root / IMAGE).write_bytes(data[: len(data) // 2])


def truncated_label(root: Path) -> None:
    data = (root / LABEL).read_bytes()
    (root / LABEL).write_bytes(data[:-800])


def corrupt_label(root: Path) -> None:
    """Whole in length and header, but one of its compressed strips is not."""
    data = bytearray((root / LABEL).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(300)
    (root / LABEL).write_bytes(bytes(data))


def no_labels(root: Path) -> None:
    for path in root.glob("5_Labels_all/*"):
        path.unlink()


def no_raster(root: Path) -> None:
    (root / IMAGE).write_text("not a picture")


def unknown_colours(root: Path) -> None:
    colors = layouts.colored(layouts.random_ids(6, 200, 200, 0), layouts.ISPRS)
    colors[:, :50] = np.array([255, 0, 255]).reshape(3, 1, 1)
    layouts.write_tiff(root / LABEL, colors)


def four_bands(root: Path) -> None:
    layouts.write_tiff(root / IMAGE, layouts.random_image(4, 200, 200, 0))


def two_bands(root: Path) -> None:
    layouts.write_tiff(root / IMAGE, layouts.random_image(2, 200, 200, 0))


def other_dtype(root: Path) -> None:
    layouts.write_tiff(root / IMAGE, layouts.random_image(3, 200, 200, 0, "uint16"))


def odd_dtype(root: Path) -> None:
    layouts.write_tiff(root / IMAGE, np.zeros((3, 200, 200)))


def grey_label(root: Path) -> None:
    layouts.write_tiff(root / LABEL, layouts.random_ids(6, 200, 200, 0)[None])


def moved_label(root: Path) -> None:
    layouts.write_tfw((root / LABEL).with_suffix(".tfw"), (366677.0, 5808000.0))


def twice(root: Path) -> None:
    (root / "copy").mkdir()
    (root / "copy" / Path(IMAGE).name).write_bytes((root / IMAGE).read_bytes())


def other_crs(root: Path) -> None:
    colors = layouts.colored(layouts.random_ids(6, 200, 200, 0), layouts.ISPRS)
    options = {"transform": Affine(0.05, 0, 366676, 0, -0.05, 5808000)}
    layouts.write_tiff(root / LABEL, colors, crs="EPSG:32633", **options)
    layouts.write_tiff(root / IMAGE, layouts.random_image(3, 200, 200, 0), crs="EPSG:25832", **options)


BAD: list[tuple[Callable[[Path], None], list[str]]] = [
    (small_image, [LABEL, "label of 200 x 200 pixels", IMAGE, "200 x 100"]),
    (orphan, [LABEL, "label of scene '2_10' without its image"]),
    (truncated, [IMAGE, "damaged or cut short"]),
    (truncated_label, [LABEL, "damaged or cut short"]),
    (corrupt_label, [LABEL, "damaged or cut short"]),
    (no_labels, ["no file matches the label pattern", "label to null"]),
    (no_raster, [IMAGE, "cannot be read"]),
    (unknown_colours, [LABEL, "25.00% of the label pixels", "255,0,255 (10000 px)", "max_unmatched_share"]),
    (four_bands, ["images of one dataset must agree", IMAGE, "has 4 of uint8"]),
    (two_bands, [IMAGE, "has 2 bands", "band 3"]),
    (other_dtype, ["images of one dataset must agree", IMAGE, "has 3 of uint16"]),
    (odd_dtype, [IMAGE, "bands of float64 are not supported"]),
    (grey_label, [LABEL, "needs 8-bit RGB"]),
    (moved_label, [LABEL, "georeference disagrees", "20.00 pixels"]),
    (twice, ["scene '2_10' has two images"]),
    (other_crs, [LABEL, "georeference disagrees"]),
]


IN_WORKERS = [(*case, 2) for case in BAD if case[0] in (truncated, unknown_colours)]
CASES = [(*case, 1) for case in BAD] + IN_WORKERS


@pytest.mark.parametrize(("spoil", "said", "workers"), CASES, ids=[f"{case[0].__name__}-{case[2]}" for case in CASES])
def test_bad_scenes_stop_the_run_and_leave_no_dataset(
    spoil: Callable[[Path], None], said: list[str], workers: int, tmp_path: Path
) -> None:
    root, out = tmp_path / "in", tmp_path / "set"
    layouts.potsdam(root, ["2_10", "2_13", "3_10"])
    spoil(root)
    with pytest.raises(InputError) as caught:
        pack(layouts.recipe("potsdam"), root, out, workers=workers)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
    with pytest.raises(InputError):
        Dataset.open(out)
    assert not list(out.glob("**/*.tar"))
    assert not list(out.glob("**/*.tmp"))


def test_a_mended_scene_lets_the_run_finish(tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "set"
    layouts.potsdam(root, ["2_10", "2_13", "3_10"])
    whole = (root / IMAGE).read_bytes()
    truncated(root)
    with pytest.raises(InputError):
        pack(layouts.recipe("potsdam"), root, out)
    (root / IMAGE).write_bytes(whole)
    mended = pack(layouts.recipe("potsdam"), root, out)
    assert mended.digest == pack(layouts.recipe("potsdam"), root, tmp_path / "other").digest


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder of scenes"):
        pack(layouts.recipe("potsdam"), tmp_path / "none", tmp_path / "set")
    with pytest.raises(InputError, match="it holds no files"):
        pack(layouts.recipe("potsdam"), tmp_path, tmp_path / "set")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(InputError, match=r"no file matches the image pattern .* it holds e.g. readme.txt"):
        pack(layouts.recipe("potsdam"), tmp_path, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_truncated_jpeg_is_not_filled_with_grey(tmp_path: Path) -> None:
    write_png(tmp_path / "in/images/x.jpg", layouts.random_image(3, 64, 64, 0))
    data = (tmp_path / "in/images/x.jpg").read_bytes()
    (tmp_path / "in/images/x.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"x\.jpg: cannot be read"):
        pack(generic(label=None, classes=[]), tmp_path / "in", tmp_path / "set")


def test_folders_of_others_are_left_alone(hamlet: Path, tmp_path: Path) -> None:
    out = tmp_path / "home"
    (out / "shards").mkdir(parents=True)
    (out / "shards" / "work.py").write_text("precious")
    for resume in (True, False):
        with pytest.raises(InputError, match="holds other files"):
            pack(layouts.recipe("potsdam"), hamlet, out, resume=resume)
    assert [p.name for p in out.rglob("*") if p.is_file()] == ["work.py"]
    with pytest.raises(InputError, match="is the folder of the scenes"):
        pack(layouts.recipe("potsdam"), hamlet, hamlet)


def test_nothing_to_train_on(hamlet: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tile is left to train on"):
        pack(
            layouts.recipe("potsdam", 'splits.scene.test=["2_13"]', "tile.min_valid_share=1", "tile.size=256"),
            hamlet,
            tmp_path / "set",
        )
    with pytest.raises(InputError, match="stands in none of"):
        pack(layouts.recipe("potsdam", "splits.scene.train=[]"), hamlet, tmp_path / "other")
