"""Small real files in the layouts of the published datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from PIL import Image
from rasterio.transform import Affine

from shards.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "configs" / "data"
ISPRS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 255], [0, 255, 0], [255, 255, 0], [255, 0, 0]], dtype=np.uint8)
GID15 = np.array(
    [
        *([200, 0, 0], [250, 0, 150], [200, 150, 150], [250, 150, 150], [0, 200, 0], [150, 250, 0], [150, 200, 150]),
        *([200, 0, 200], [150, 0, 250], [150, 150, 250], [250, 200, 0], [200, 200, 0], [0, 0, 200], [0, 150, 200]),
        [0, 200, 250],
    ],
    dtype=np.uint8,
)
GID5 = np.array([[255, 0, 0], [0, 255, 0], [0, 255, 255], [255, 255, 0], [0, 0, 255]], dtype=np.uint8)


def random_ids(classes: int, height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """Class ids [H,W] in patches of 8 x 8 pixels."""
    patches = np.random.default_rng(seed).integers(0, classes, (-(-height // 8), -(-width // 8)), dtype=np.uint8)
    return np.kron(patches, np.ones((8, 8), dtype=np.uint8))[:height, :width]


def random_image(bands: int, height: int, width: int, seed: int, dtype: str = "uint8") -> npt.NDArray[Any]:
    """Smooth noise [C,H,W] that uses much of the dtype's range and never holds 0."""
    generator = np.random.default_rng(seed)
    steps = generator.normal(0, 4, (bands, height, width)).cumsum(axis=2)
    scale = {"uint8": 1.0, "uint16": 200.0, "int16": 80.0, "float32": 0.01}[dtype]
    values = (steps + 100) * scale
    if dtype == "float32":
        return values.astype(np.float32)
    info = np.iinfo(dtype)
    return np.clip(values, max(info.min, -20000) or 1, info.max).astype(dtype)


def colored(ids: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Colours [3,H,W] of class ids; 255 is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return np.moveaxis(table[ids], -1, 0)


def write_tiff(path: Path, array: npt.NDArray[Any], **options: Any) -> Path:
    """A GeoTIFF [C,H,W]; options go to rasterio."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": str(array.dtype)}
    with rasterio.open(path, "w", **{**profile, **options}) as target:
        target.write(array)
    return path


def write_tfw(path: Path, origin: tuple[float, float], pixel: float = 0.05) -> None:
    """A world file: pixel size and the centre of the upper left pixel."""
    center = (origin[0] + pixel / 2, origin[1] - pixel / 2)
    path.write_text("\n".join(map(str, [pixel, 0.0, 0.0, -pixel, *center])) + "\n")


def potsdam(
    root: Path,
    scenes: Sequence[str],
    height: int = 200,
    width: int = 200,
    bands: str = "RGB",
    unlabelled: Sequence[str] = (),
) -> dict[str, npt.NDArray[np.uint8]]:
    """The Potsdam layout: .tfw sidecars, no CRS; the class ids of each labelled scene."""
    truth = {}
    for number, scene in enumerate([*scenes, *unlabelled]):
        image = root / f"2_Ortho_{bands}" / f"top_potsdam_{scene}_{bands}.tif"
        write_tiff(
            image, random_image(len(bands), height, width, number), photometric="RGB" if bands == "RGB" else None
        )
        origin = (366676.0 + 300 * number, 5808000.0)
        write_tfw(image.with_suffix(".tfw"), origin)
        if scene in scenes:
            truth[scene] = random_ids(6, height, width, number)
            label = root / "5_Labels_all" / f"top_potsdam_{scene}_label.tif"
            write_tiff(label, colored(truth[scene], ISPRS), compress="lzw", blockysize=3)
            write_tfw(label.with_suffix(".tfw"), origin)
    return truth


def vaihingen(root: Path, areas: dict[int, tuple[int, int]]) -> dict[int, npt.NDArray[np.uint8]]:
    """The Vaihingen layout: image and label of one name in two folders, sizes (height, width) that vary."""
    truth = {}
    for area, (height, width) in areas.items():
        name = f"top_mosaic_09cm_area{area}.tif"
        options = {"transform": Affine(0.09, 0, 496000.0 + area, 0, -0.09, 5419000.0), "crs": "EPSG:32632"}
        write_tiff(root / "top" / name, random_image(3, height, width, area), **options)
        truth[area] = random_ids(6, height, width, area)
        write_tiff(root / "gts_for_participants" / name, colored(truth[area], ISPRS), **options)
    return truth


def gid(
    root: Path, scenes: int, height: int, width: int, nir: bool = False, fine: bool = False
) -> dict[str, npt.NDArray[np.uint8]]:
    """The GID layout; a part of each label is black."""
    truth = {}
    for number in range(scenes):
        scene = f"GF2_PMS{1 + number % 2}__L1A00006477{number:02d}-MSS{1 + number % 2}"
        folder, bands = ("image_NirRGB", 4) if nir else ("image_RGB", 3)
        # The driver tags the fourth band as alpha, as in the published files, and near infrared may be 0.
        image = random_image(bands, height, width, number)
        image[-1, :4] = 0
        options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "photometric": "RGB"}
        write_tiff(root / folder / f"{scene}.tif", image, **(options | ({"alpha": "YES"} if nir else {})))
        truth[scene] = random_ids(15 if fine else 5, height, width, number)
        truth[scene][:, : width // 4] = 255
        label = (
            root / "label_15classes" / f"{scene}_15label.tif"
            if fine
            else root / "label_5classes" / f"{scene}_label.tif"
        )
        write_tiff(label, colored(truth[scene], GID15 if fine else GID5), compress="lzw")
    return truth


def loveda(root: Path, parts: dict[str, Sequence[int]]) -> dict[str, npt.NDArray[np.uint8]]:
    """The LoveDA layout: PNGs without georeference, masks of 0 (no label) to 7, none for Test; by scene the masks."""
    truth = {}
    for part, numbers in parts.items():
        for number in numbers:
            place = "Urban" if number % 2 else "Rural"
            image = np.moveaxis(random_image(3, 80, 80, number), 0, -1)
            folder = root / part / place
            (folder / "images_png").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "images_png" / f"{number}.png")
            if part != "Test":
                (folder / "masks_png").mkdir(parents=True, exist_ok=True)
                mask = random_ids(8, 80, 80, number)
                Image.fromarray(mask).save(folder / "masks_png" / f"{number}.png")
                truth[f"{part}_{place}_{number}"] = mask
    return truth


def recipe(name: str, *overrides: str) -> Recipe:
    """A shipped recipe, with small tiles unless the overrides say otherwise."""
    return load_recipe(RECIPES / f"{name}.yaml", ["tile.size=64", *overrides])
