"""From end to end with what real archives hold: five uint16 bands, a CRS without EPSG code, nodata, odd sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine

from tests.tiny import run, write_config

BANDS = ["blue", "green", "red", "red_edge", "nir"]
COLORS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
CRS = (
    'PROJCS["site grid",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",47.1],PARAMETER["central_meridian",8.3],PARAMETER["scale_factor",1],'
    'PARAMETER["false_easting",1000],PARAMETER["false_northing",2000],UNIT["metre",1]]'
)
TRANSFORM = Affine(0.3, 0.0, 1012.7, 0.0, -0.3, 2044.1)
SIZES = [(70, 100), (45, 33), (20, 25), (64, 64), (97, 41), (33, 90), (64, 32), (50, 50)]  # tiles are 32 px
EMPTY = 0


def write_scene(folder: Path, number: int, size: tuple[int, int]) -> None:
    """Three classes that the spectrum tells apart; the first rows of each scene hold no data."""
    draw = np.random.default_rng(number)
    ids = draw.integers(0, 3, (-(-size[0] // 8), -(-size[1] // 8))).repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    image = (1000 + 3000 * ids[None] * np.arange(1, 6)[:, None, None] / 5 + draw.normal(0, 200, (5, *size))).clip(1)
    image[:, :5] = EMPTY
    profile = {"driver": "GTiff", "height": size[0], "width": size[1], "crs": CRS, "transform": TRANSFORM}
    with rasterio.open(folder / f"image_{number}.tif", "w", count=5, dtype="uint16", nodata=EMPTY, **profile) as file:
        file.write(image.astype(np.uint16))
    if number < 6:  # the last two scenes are unlabelled data
        with rasterio.open(folder / f"label_{number}.tif", "w", count=3, dtype="uint8", **profile) as file:
            file.write(COLORS[ids].transpose(2, 0, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "scenes").mkdir()
    for number, size in enumerate(SIZES):
        write_scene(folder / "scenes", number, size)
    recipe = {
        "name": "odd",
        "image": {"pattern": r"image_(?P<scene>\d+)\.tif"},
        "label": {"pattern": r"label_(?P<scene>\d+)\.tif", "kind": "palette"},
        "bands": {"names": BANDS},
        "classes": [{"name": n, "color": c.tolist()} for n, c in zip("abc", COLORS, strict=True)],
        "tile": {"size": 32},
        "splits": {"protocol": "scene", "scene": {"test": ["0"], "val": ["1"], "train": ["*"]}},
    }
    (folder / "odd.yaml").write_text(yaml.safe_dump(recipe))
    run("dctc", "shard", folder / "odd.yaml", folder / "dataset", "--root", folder / "scenes")
    config = write_config(
        folder / "run.yaml",
        folder / "dataset",
        optimizer={"lr": 1e-2},
        run={"checkpoint_every": 0},
        schedule={"rounds": 100},
        evaluation={"test": True},
    )
    run("dctc", "train", config)
    return folder / "runs" / "odd-scene" / "run" / "model.safetensors"


def test_the_map_lies_where_the_scene_lies(model: Path, tmp_path: Path) -> None:
    scenes = model.parents[3] / "scenes"
    for number, size in enumerate(SIZES[:3]):
        run("dctc", "predict", model, scenes / f"image_{number}.tif", "--out", tmp_path, "--net", "teacher")
        with rasterio.open(tmp_path / f"image_{number}_classes.tif") as file:
            assert file.crs == rasterio.crs.CRS.from_wkt(CRS)
            assert file.transform == TRANSFORM
            assert file.shape == size
            classes = file.read(1)
        assert (classes[:5] == 255).all()
        assert (classes[5:] < 3).all()


def test_the_teacher_has_learnt_the_spectra(model: Path, tmp_path: Path) -> None:
    """A hundred rounds tell three flat spectra apart: bands, normalisation and labels are where they belong."""
    scene = model.parents[3] / "scenes" / "image_0.tif"
    run("dctc", "predict", model, scene, "--out", tmp_path, "--net", "teacher")
    with rasterio.open(tmp_path / "image_0_classes.tif") as file:
        predicted = file.read(1)[5:]
    with rasterio.open(scene.with_name("label_0.tif")) as file:
        truth = file.read()[:, 5:].argmax(axis=0)
    assert (predicted == truth).mean() > 0.7
