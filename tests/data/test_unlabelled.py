"""Extra imagery without labels, from folders of its own."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import InputError
from shards.index import Index
from shards.pack import Packed, pack
from shards.report import read_plan
from tests.data import layouts
from tests.data.own import TWO, generic, packed_from, write_png
from tests.data.real import whole

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

EXTRA: dict[str, Any] = {"folder": "more", "pattern": r"(?P<place>\w+)/(?P<scene>[^/]+)\.tif"}
SCENES = {"test": ["a*"], "train": ["b*"]}


def write_scenes(root: Path) -> None:
    for number, name in enumerate(["a1", "b1"]):
        layouts.write_tiff(root / f"images/{name}.tif", layouts.random_image(3, 32, 64, number))
        write_png(root / f"labels/{name}.png", layouts.colored(layouts.random_ids(2, 32, 64, number), TWO))


def packed(tmp_path: Path, *extras: dict[str, Any], out: str = "", **changes: Any) -> Packed:
    splits = {"protocol": "scene", "scene": SCENES}
    return packed_from(generic(unlabelled=list(extras), splits=splits, **changes), tmp_path / "in", tmp_path / out)


@pytest.mark.parametrize("absolute", [False, True])
def test_more_imagery_trains_whatever_the_splits_say(tmp_path: Path, absolute: bool) -> None:
    write_scenes(tmp_path / "in")
    folder = tmp_path / "elsewhere" if absolute else tmp_path / "in" / "more"
    image = layouts.random_image(3, 40, 40, 7)
    layouts.write_tiff(folder / "north/a1.tif", image)
    layouts.write_tfw(folder / "north/a1.tfw", (5.0, 6.0))
    layouts.write_tiff(folder / "south/a1.tif", layouts.random_image(3, 32, 32, 8))
    extra = EXTRA | ({"folder": str(folder)} if absolute else {})
    got = packed(tmp_path, extra)
    assert got.manifest.scenes == ["a1", "b1", "north_a1", "south_a1"]
    splits = got.manifest.splits
    assert (splits["test"].scenes, splits["train"].scenes, splits["train"].tiles) == (1, 3, 2 + 4 + 1)
    assert (splits["train"].labelled, got.report.unlabelled_scenes) == (2, 2)
    index = Index.open(got)
    assert len(index.unlabelled_rows(Fraction(1))) == 5
    assert np.array_equal(whole(got, "north_a1", 40, 40)[0], image)
    scene = read_plan(got)["scenes"][2]
    start = str(folder) if absolute else "more"
    assert (scene["extra"], scene["labelled"]) == (True, False)
    assert [entry["path"] for entry in scene["inputs"]] == [f"{start}/north/a1.tif", f"{start}/north/a1.tfw"]
    pixels = np.concatenate([layouts.random_image(3, 32, 64, 1).reshape(3, -1), image.reshape(3, -1)], axis=1)
    south = layouts.random_image(3, 32, 32, 8).reshape(3, -1)
    mean = np.concatenate([pixels, south], axis=1).mean(axis=1)
    assert [band.mean for band in got.manifest.bands] == pytest.approx(mean.tolist())
    again = pack(generic(unlabelled=[extra], splits={"protocol": "scene", "scene": SCENES}), tmp_path / "in", got.root)
    assert again.digest == got.digest


def test_ids_of_their_own(tmp_path: Path) -> None:
    write_scenes(tmp_path / "in")
    layouts.write_tiff(tmp_path / "more/a1.tif", layouts.random_image(3, 32, 32, 0))
    extra = {"folder": "../more", "pattern": r"(?P<scene>[^/]+)\.tif"}
    with pytest.raises(InputError, match=r"scene 'a1' stands twice, images/a1\.tif and \.\./more/a1\.tif: .* scene_id"):
        packed(tmp_path, extra)
    got = packed(tmp_path, extra | {"scene_id": "more-{scene}"})
    assert got.manifest.scenes == ["a1", "b1", "more-a1"]
    assert read_plan(got)["scenes"][2]["inputs"][0]["path"] == "../more/a1.tif"


def test_the_paper_protocol_and_drawn_scenes_leave_them_in_training(tmp_path: Path) -> None:
    write_scenes(tmp_path / "in")
    for name in "uvwxyz":
        layouts.write_tiff(tmp_path / f"in/more/k/{name}.tif", layouts.random_image(3, 32, 32, 0))
    for splits in ({"protocol": "paper"}, {"protocol": "scene", "scene": {"test_share": 0.5}}):
        recipe = generic(unlabelled=[EXTRA], splits=splits)
        got = packed_from(recipe, tmp_path / "in", tmp_path / str(splits["protocol"]))
        assert got.manifest.splits["train"].scenes >= 7
        assert got.manifest.splits["test"].labelled == got.manifest.splits["test"].tiles > 0


def test_stacks_too(tmp_path: Path) -> None:
    bands = {scene: layouts.random_image(2, 32, 32, n) for n, scene in enumerate(["x", "y"])}
    for scene, image in bands.items():
        for number, band in enumerate(image):
            layouts.write_tiff(tmp_path / f"in/{scene}/{scene}_{number}.tif", band[None])
    layouts.write_tiff(tmp_path / "in/both/z.tif", bands["x"])
    recipe = generic(
        image={"pattern": r"x/(?P<scene>\w)_(?P<band>\d)\.tif", "files": [1, 0]},
        unlabelled=[
            {"folder": "y", "pattern": r"(?P<scene>\w)_(?P<band>\d)\.tif"},
            {"folder": "both", "pattern": r"(?P<scene>\w)\.tif"},  # all bands in one file
        ],
        bands={"names": ["one", "two"]},
        label=None,
        classes=[],
        splits={"protocol": "scene", "scene": {"train": ["x"]}},
    )
    got = packed_from(recipe, tmp_path / "in", tmp_path)
    for scene in ("x", "y"):
        assert np.array_equal(whole(got, scene, 32, 32)[0], bands[scene][::-1])
    assert np.array_equal(whole(got, "z", 32, 32)[0], bands["x"])


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    write_scenes(tmp_path / "in")
    with pytest.raises(InputError, match=r"in/more: no such folder; unlabelled\.folder is absolute or relative"):
        packed(tmp_path, EXTRA)
    (tmp_path / "in/more").mkdir()
    with pytest.raises(InputError, match="no file matches the unlabelled pattern"):
        packed(tmp_path, EXTRA)
    layouts.write_tiff(tmp_path / "in/more/k/u.tif", layouts.random_image(4, 32, 32, 0))
    with pytest.raises(InputError, match=r"more/k/u\.tif: 4 bands of uint8, but images/a1\.tif has 3 of uint8"):
        packed(tmp_path, EXTRA)
    with pytest.raises(InputError, match=r"images/a1\.tif: is scene 'a1' and, by unlabelled, scene 'images_a1' too"):
        packed(tmp_path, EXTRA | {"folder": "."})
