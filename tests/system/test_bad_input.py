"""Bad input: one clear message that names the culprit, exit code 2, nothing half-written (product.md)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

from dctc.cli import main
from tests.tiny import ROOT, launch, write_config

RECIPE = ROOT / "configs" / "data" / "synthetic.yaml"
Dctc = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Dctc:
    """Run a ``dctc`` command that must end with exit code 2; gives its message."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dctc", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            main()
        message = capfd.readouterr().err
        assert ending.value.code == 2, message
        assert "Traceback" not in message
        assert message.startswith("error: ")
        assert len(message.strip().splitlines()) == 1
        return message

    return call


@pytest.fixture
def scenes(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A private copy of the scenes of the tiny dataset."""
    return Path(shutil.copytree(tiny_dataset.parent / "scenes", tmp_path / "scenes"))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace a raster by ``change`` of its pixels [bands,H,W]."""
    with rasterio.open(path) as source:
        profile, pixels = source.profile, change(source.read())
    profile.update(count=pixels.shape[0], height=pixels.shape[1], width=pixels.shape[2])
    path.unlink()
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels)


def test_missing_scene_folder(refused: Dctc, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused("shard", RECIPE, tmp_path / "out", "--root", tmp_path / "nowhere")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_recipe(refused: Dctc, tmp_path: Path) -> None:
    assert "none.yaml" in refused("shard", tmp_path / "none.yaml", tmp_path / "out")


def test_image_and_label_of_different_size(refused: Dctc, scenes: Path, tmp_path: Path) -> None:
    rewrite(scenes / "top_potsdam_1_2_label.tif", lambda pixels: pixels[:, :-8])
    message = refused("shard", RECIPE, tmp_path / "out", "--root", scenes, "tile.size=32")
    assert "top_potsdam_1_2_label.tif" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_unknown_colors_above_the_tolerated_share(refused: Dctc, scenes: Path, tmp_path: Path) -> None:
    def paint(pixels: np.ndarray) -> np.ndarray:
        pixels[:, :40, :40] = np.array([10, 90, 170], np.uint8)[:, None, None]
        return pixels

    rewrite(scenes / "top_potsdam_1_3_label.tif", paint)
    message = refused("shard", RECIPE, tmp_path / "out", "--root", scenes, "tile.size=32")
    assert "top_potsdam_1_3_label.tif" in message
    assert "10,90,170" in message.replace(" ", "")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_label_without_its_image(refused: Dctc, scenes: Path, tmp_path: Path) -> None:
    (scenes / "top_potsdam_1_4_RGB.tif").unlink()
    assert "1_4" in refused("shard", RECIPE, tmp_path / "out", "--root", scenes, "tile.size=32")


def test_truncated_scene(refused: Dctc, scenes: Path, tmp_path: Path) -> None:
    path = scenes / "top_potsdam_1_1_RGB.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused("shard", RECIPE, tmp_path / "out", "--root", scenes, "tile.size=32")
    assert "top_potsdam_1_1_RGB.tif" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_dataset(refused: Dctc, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tmp_path / "nothing")
    assert "dctc shard" in run_refused(config)
    assert not (tmp_path / "runs").exists()


def test_unknown_key_names_the_nearest(refused: Dctc, tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_dataset)
    message = run_refused(config, "data.labeled_share=1/8")
    assert "data.labeled_share" in message
    assert "labelled_share" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.labelled_share=0", ["data.labelled_share", "(0, 1]"]),
        ("data.labelled_share=1.5", ["data.labelled_share", "(0, 1]"]),
        ("optimizer.lr=fast", ["optimizer.lr", "fast"]),
        ("method.name=dtcc", ["method.name", "dctc"]),
        ("method.sharpness=2", ["method.sharpness", "sharpen"]),
        ("method.temperature=3", ["temperature"]),
        ("network.name=unett", ["network.name", "unet"]),
        ("network.norm=sync", ["network.norm", "GPU"]),
        ("tracking.uri=somewhere tracking.enabled=true", ["tracking.uri", "somewhere"]),
        ("data.batch_labelled=3 parallel.accumulation=2", ["batch of 3", "multiple of 2"]),
        ("run.resume=/no/such/checkpoint", ["/no/such/checkpoint"]),
    ],
)
def test_bad_settings(tmp_path: Path, tiny_dataset: Path, override: str, words: list[str]) -> None:
    message = run_refused(write_config(tmp_path / "run.yaml", tiny_dataset), *override.split())
    for word in words:
        assert word in message
    assert not list(tmp_path.glob("runs/*/*/model.safetensors"))


def run_refused(config: Path, *overrides: str) -> str:
    """Train in this process; the run must be refused with code 2. Gives the message."""
    import contextlib
    import io

    from dctc.train import command

    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        assert command([str(config), *overrides]) == 2, text.getvalue()
    return text.getvalue()


def test_more_ranks_than_tiles(tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_dataset)
    done = launch(2, config, "data.labelled_share=1/1000", check=False)
    assert done.returncode != 0
    assert "1 selected tiles for 2 ranks" in done.stderr


def test_model_of_other_bands_than_the_scene(refused: Dctc, scenes: Path, tmp_path: Path, tiny_model: Path) -> None:
    scene = scenes / "top_potsdam_1_1_RGB.tif"
    rewrite(scene, lambda pixels: pixels[:2])
    message = refused("predict", tiny_model, scene, "--out", tmp_path / "maps")
    assert "top_potsdam_1_1_RGB.tif" in message
    assert "2" in message
    assert not list(tmp_path.glob("maps/*"))


def test_a_file_that_is_no_model(refused: Dctc, tmp_path: Path, tiny_dataset: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    assert "model.safetensors" in refused("evaluate", tmp_path / "model.safetensors", tiny_dataset)


def test_damaged_shard_is_named_by_evaluate(
    refused: Dctc, tmp_path: Path, tiny_dataset: Path, tiny_model: Path
) -> None:
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    shard = next(dataset.glob("shards/test-*.tar"))
    raw = bytearray(shard.read_bytes())
    for place in range(600, len(raw), 1500):
        raw[place] ^= 0xFF
    shard.write_bytes(raw)
    assert shard.name in refused("evaluate", tiny_model, dataset)
