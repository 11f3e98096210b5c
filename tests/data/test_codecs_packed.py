"""Datasets in every codec: packed, read by dctc, and read by what others use."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import webdataset
from PIL import Image
from rasterio.io import MemoryFile

from dctc.data.tiles import TileDataset
from shards.errors import InputError
from shards.index import Index, rebuild, tile_name
from shards.manifest import SPLITS
from shards.pack import Packed, pack
from shards.recipe import Recipe
from shards.tiles import read_tile
from shards.verify import verify
from tests.data import layouts
from tests.data.cluster import REPOSITORY
from tests.data.own import TWO, generic, write_png

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

CODECS = [("geotiff", "geotiff"), ("npy", "npy"), ("png", "png"), ("jpeg", "png"), ("jpeg", "npy")]
FILES = {"geotiff": "tif", "npy": "npy", "png": "png", "jpeg": "jpg"}


@pytest.fixture(scope="module")
def villages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 90 x 70 pixels whose edges are no multiple of a tile's; one has no label, one a hole without data."""
    root = tmp_path_factory.mktemp("villages")
    for number, name in enumerate(["a", "b", "c", "d"]):
        image = layouts.random_image(3, 90, 70, number)
        if name == "b":
            image[:, 20:50, 20:50] = 0
        layouts.write_tiff(root / f"images/{name}.tif", image, nodata=0)
        if name != "d":
            write_png(root / f"labels/{name}.png", layouts.colored(layouts.random_ids(2, 90, 70, number), TWO))
    return root


def villages_recipe(image: str, label: str, **changes: Any) -> Recipe:
    splits = {"protocol": "scene", "scene": {"test": ["c"], "train": ["*"]}}
    return generic(splits=splits, codec={"image": image, "label": label}, **changes)


@pytest.fixture(scope="module", params=CODECS, ids="-".join)
def dataset(request: pytest.FixtureRequest, villages: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(villages_recipe(*request.param), villages, tmp_path_factory.mktemp("codec") / "set")


def truth(villages: Path, scene: str, row: int, col: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Image and validity of a 32-pixel tile, straight from the scene."""
    image, valid = np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32), bool)
    with MemoryFile((villages / f"images/{scene}.tif").read_bytes()) as file, file.open() as source:
        pixels = source.read()[:, row : row + 32, col : col + 32]
    image[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    valid[: pixels.shape[1], : pixels.shape[2]] = pixels.any(axis=0)
    return image, valid


def test_what_was_packed_is_read(dataset: Packed, villages: Path) -> None:
    index = Index.open(dataset)
    batch = TileDataset(dataset, labels=True).__getitems__([(row, row) for row in range(len(index))])
    lossy = dataset.manifest.codec["image"] == "jpeg"
    partial = 0
    for row in range(len(index)):
        tile = read_tile(dataset, index, row)
        scene, window = tile.meta["scene"], tile.meta["window"]
        image, valid = truth(villages, scene, window["row"], window["col"])
        assert np.array_equal(tile.valid, valid)
        assert np.array_equal(batch["valid"][row].numpy(), valid)
        assert np.array_equal(batch["images"][row].numpy(), tile.image)
        assert not tile.image[:, ~valid].any()
        difference = np.abs(tile.image.astype(int) - image)
        assert difference.mean() < 4 if lossy else difference.max() == 0
        ids = np.full((32, 32), 255, np.uint8)
        if scene != "d":
            whole = layouts.random_ids(2, 90, 70, "abc".index(scene))[window["row"] :, window["col"] :][:32, :32]
            ids[: whole.shape[0], : whole.shape[1]] = whole
            ids[~valid] = 255
        assert np.array_equal(batch["labels"][row].numpy(), ids)
        assert (tile.label is None) == (scene == "d")
        partial += not valid.all()
    assert partial > 8
    masks = int((index.mask_size > 0).sum())
    assert masks == (0 if dataset.manifest.codec["image"] == "geotiff" else partial)
    assert ((index.mask_crc32 > 0) == (index.mask_size > 0)).all()
    assert ((index.mask_offset > 0) == (index.mask_size > 0)).all()


def test_index_from_the_shards_alone_and_verify(dataset: Packed) -> None:
    assert verify(dataset.root) == []
    again = rebuild(dataset)
    index = Index.open(dataset)
    for name, column in again.items():
        assert np.array_equal(column, getattr(index, name)), name


def test_statistics_are_those_of_what_is_stored(dataset: Packed) -> None:
    index = Index.open(dataset)
    tiles = [read_tile(dataset, index, row) for row in index.rows("train").tolist()]
    pixels = np.concatenate([tile.image[:, tile.valid] for tile in tiles], axis=1).astype(np.float64)
    for band, values in zip(dataset.manifest.bands, pixels, strict=True):
        assert band.mean == pytest.approx(values.mean(), rel=1e-13)
        assert band.std == pytest.approx(values.std(), rel=1e-12)
        assert (band.minimum, band.maximum) == (values.min(), values.max())


def test_the_manifest_says_what_is_lossy(dataset: Packed) -> None:
    codec = dataset.manifest.codec
    assert codec.get("quality") == ("95" if codec["image"] == "jpeg" else None)
    assert codec["lossy"] == ("yes" if codec["image"] == "jpeg" else "no")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "dctc.cli", "inspect", str(dataset.root)]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert f"{codec['image']} images" in shown
    assert ("lossy, quality 95" in shown) == (codec["image"] == "jpeg")


def urls(dataset: Packed, *splits: str) -> list[str]:
    return [str(dataset.root / s.name) for s in dataset.manifest.shards if s.split in (splits or SPLITS)]


def decoded(dataset: Packed, sample: dict[str, Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Image [C,S,S] and label of a raw sample by none of dctc's code."""

    def pixels(name: str, codec: str) -> npt.NDArray[Any]:
        data = sample[f"{name}.{FILES[codec]}"]
        if codec == "npy":
            array: npt.NDArray[Any] = np.load(io.BytesIO(data))
            return array
        if codec == "geotiff":
            with MemoryFile(data) as file, file.open() as source:
                bands: npt.NDArray[Any] = source.read()
                return bands if name == "image" else bands[0]
        picture = np.asarray(Image.open(io.BytesIO(data)))
        return np.moveaxis(picture, -1, 0) if name == "image" else picture

    codec = dataset.manifest.codec
    labelled = any(key.startswith("label.") for key in sample)
    return pixels("image", codec["image"]), pixels("label", codec["label"]) if labelled else None


def test_webdataset_reads_it(dataset: Packed) -> None:
    index = Index.open(dataset)
    rows = {tile_name(dataset, index, row): row for row in range(len(index))}
    for sample in webdataset.WebDataset(urls(dataset), shardshuffle=False):
        row = rows.pop(sample["__key__"])
        tile = read_tile(dataset, index, row)
        image, label = decoded(dataset, sample)
        assert np.array_equal(image[:, tile.valid], tile.image[:, tile.valid])
        assert (label is None) == (tile.label is None)
        assert label is None or np.array_equal(label, tile.label)  # type: ignore[arg-type]  # both are there or neither
        if "mask.png" in sample:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["mask.png"]))) == 255, tile.valid)
        assert ("mask.png" in sample) == bool(index.mask_size[row])
    assert not rows


def test_tarfile_reads_it(dataset: Packed) -> None:
    codec = dataset.manifest.codec
    kinds = [f"image.{FILES[codec['image']]}", "mask.png", f"label.{FILES[codec['label']]}", "meta.json"]
    for url in urls(dataset):
        with tarfile.open(url) as archive:
            names = [name.partition(".") for name in archive.getnames()]
        order = [(key, kinds.index(kind)) for key, _, kind in names]
        keys = list(dict.fromkeys(key for key, _ in order))
        assert order == sorted(order, key=lambda entry: (keys.index(entry[0]), entry[1])), "members of a tile together"


HUGGINGFACE = """
import json, sys
from datasets import Features, Json, Value, load_dataset
members, files = sys.argv[1].split(), sys.argv[2:]
features = Features({name: Value("string") for name in ("__key__", "__url__")} | {n: Value("binary") for n in members})
if members:
    features["meta.json"] = Json()
data_files = {"train": files}
for sample in load_dataset(
    "webdataset", data_files=data_files, split="train", streaming=True, features=features if members else None
):
    there = [name for name, value in sample.items() if value is not None and "." in name]
    print(json.dumps([sample["__key__"], there, sample["meta.json"]]))
"""


def huggingface(folder: Path, members: list[str], files: list[str]) -> dict[str, tuple[set[str], dict[str, Any]]]:
    """Key -> names of the members and metadata, as Hugging Face's reader has them, without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", HUGGINGFACE, " ".join(members), *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {key: (set(names), meta) for key, names, meta in map(json.loads, done.stdout.splitlines())}


def test_huggingface_datasets_reads_it(dataset: Packed, tmp_path: Path) -> None:
    codec = dataset.manifest.codec
    image, label = f"image.{FILES[codec['image']]}", f"label.{FILES[codec['label']]}"
    seen = huggingface(tmp_path, [image, "mask.png", label], urls(dataset, "train"))
    index = Index.open(dataset)
    assert sorted(seen) == [tile_name(dataset, index, row) for row in index.rows("train").tolist()]
    for row in index.rows("train").tolist():
        members = {image, "meta.json"}
        members |= {label} if index.label_size[row] else set()
        members |= {"mask.png"} if index.mask_size[row] else set()
        found, meta = seen[tile_name(dataset, index, row)]
        assert found == members
        assert meta == read_tile(dataset, index, row).meta
    if codec["image"] == "geotiff":  # all tiles of the test split have the same members: nothing need be said
        plain = huggingface(tmp_path, [], urls(dataset, "test"))
        assert len(plain) == len(index.rows("test"))
        assert all(found == {image, label, "meta.json"} for found, _ in plain.values())


def test_impossible_combinations_stop_before_any_work(tmp_path: Path) -> None:
    layouts.write_tiff(tmp_path / "in/images/x.tif", layouts.random_image(3, 40, 40, 0, "uint16"))
    write_png(tmp_path / "in/labels/x.png", layouts.colored(layouts.random_ids(2, 40, 40, 0), TWO))
    with pytest.raises(
        InputError, match=r"codec\.image jpeg holds uint8 with 1 or 3 bands, these images are uint16 with 3"
    ):
        pack(villages_recipe("jpeg", "png"), tmp_path / "in", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("codec", ["geotiff", "npy", "png"])
def test_other_dtypes(tmp_path: Path, codec: str, dtype: str) -> None:
    if (codec, dtype) in (("png", "int16"), ("png", "float32")):
        with pytest.raises(InputError, match=r"set codec\.image to one of geotiff, npy"):
            pack(_four_bands(tmp_path, dtype, codec), tmp_path / "in", tmp_path / "set")
        return
    dataset = pack(_four_bands(tmp_path, dtype, codec), tmp_path / "in", tmp_path / "set")
    index = Index.open(dataset)
    pixels = layouts.random_image(4, 40, 40, 0, dtype)
    pixels[3, ::2] = 0  # not alpha
    for row in range(len(index)):
        tile = read_tile(dataset, index, row)
        top, left = tile.meta["window"]["row"], tile.meta["window"]["col"]
        expected = pixels[:, top : top + 32, left : left + 32]
        assert np.array_equal(tile.image[:, : expected.shape[1], : expected.shape[2]], expected)
        assert tile.valid.sum() == expected[0].size
    for band, values in zip(dataset.manifest.bands, pixels.reshape(4, -1).astype(np.float64), strict=True):
        assert band.mean == pytest.approx(values.mean(), rel=1e-12)


def _four_bands(folder: Path, dtype: str, codec: str) -> Recipe:
    pixels = layouts.random_image(4, 40, 40, 0, dtype)
    pixels[3, ::2] = 0
    layouts.write_tiff(folder / "in/images/x.tif", pixels, photometric="MINISBLACK")
    return generic(
        label=None, classes=[], bands={"names": list("rgbn")}, codec={"image": codec}, splits={"protocol": "scene"}
    )


def test_the_examples_of_the_documentation_run(villages: Path, tmp_path: Path) -> None:
    pack(villages_recipe("geotiff", "geotiff"), villages, tmp_path / "datasets/synthetic")
    chapter = (REPOSITORY / "docs/data.md").read_text().partition("## Reading with other tools")[2]
    webdataset_example, huggingface_example = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)[:2]
    script = f"{webdataset_example}\n{huggingface_example}\nprint(sum(1 for _ in tiles))\n"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, count = done.stdout.splitlines()
    assert "(3, 32, 32)" in first
    assert int(count) == 3 * 9
