"""predict_scene on bad input, full disks, interruptions and tall scenes: whole files or none, in bounded memory."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from dctc.mapping.predict import predict_scene
from shards.errors import InputError
from tests.system.oracle import Oracle, labels, read, write_scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def bad_inputs(folder: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    scene = write_scene(folder / "scene.tif", labels(70, 80))
    truncated = write_scene(folder / "truncated.tif", labels(300, 400))
    truncated.write_bytes(truncated.read_bytes()[:-60_000])
    jpeg = write_scene(folder / "short.jpg", 40 * labels(300, 400), driver="JPEG")
    jpeg.write_bytes(jpeg.read_bytes()[:20_000])
    (folder / "text.tif").write_text("no raster")
    rgb = write_scene(folder / "rgb.tif", np.concatenate([labels(40, 40)] * 3))
    with rasterio.open(rgb, "r+") as file:
        file.descriptions = ("red", "green", "blue")
    diverged = Oracle()
    diverged.logits = lambda raw: {"s1": torch.full((len(raw), 6, 32, 32), torch.nan)}  # type: ignore[method-assign]
    out = folder / "maps"
    return {
        "other bands": (
            lambda: predict_scene(Oracle(), rgb, out),
            r"rgb.tif has 3 bands \(red, green, blue\).* wants 1 \(id\)",
        ),
        "one band of another name": (
            lambda: predict_scene(Oracle(32, ("nir", "red", "green")), rgb, out),
            r"rgb.tif has 3 bands \(red, green, blue\).* wants 3 \(nir, red, green\)",
        ),
        "band numbers": (lambda: predict_scene(Oracle(), rgb, out, bands=[4]), r"bands \[4\] of .*rgb.tif"),
        "dtype": (
            lambda: predict_scene(Oracle(dtype="uint16"), scene, out),
            "scene.tif: band 1 is uint8.* on uint16.*convert",
        ),
        "truncated": (lambda: predict_scene(Oracle(), truncated, out), "truncated.tif: cannot be read between rows"),
        "truncated jpeg": (lambda: predict_scene(Oracle(), jpeg, out), "short.jpg: cannot be read between rows"),
        "no raster": (lambda: predict_scene(Oracle(), folder / "text.tif", out), "text.tif: cannot be opened"),
        "no file": (lambda: predict_scene(Oracle(), folder / "none.tif", out), "none.tif: cannot be opened"),
        "no folder": (lambda: predict_scene(Oracle(), scene, scene / "maps"), "scene.tif/maps: this output folder"),
        "net": (lambda: predict_scene(Oracle(), scene, out, net="s3"), "net 's3' is not in this model: it has s1, s2"),
        "batch": (lambda: predict_scene(Oracle(), scene, out, batch=0), "batch 0"),
        "overlap": (lambda: predict_scene(Oracle(), scene, out, overlap=1), "overlap 1"),
        "not finite": (lambda: predict_scene(diverged, scene, out, entropy=True), "scene.tif: .* not finite"),
    }


@pytest.mark.parametrize("kind", [
    "other bands", "one band of another name", "band numbers", "dtype", "truncated", "truncated jpeg", "no raster",
    "no file", "no folder", "net", "batch", "overlap", "not finite",
])  # fmt: skip
def test_bad_input_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    call, message = bad_inputs(tmp_path)[kind]
    with pytest.raises(InputError, match=message):
        call()
    assert not (tmp_path / "maps").exists() or not list((tmp_path / "maps").iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_older_map_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    scene = write_scene(tmp_path / "scene.tif", labels(200, 200))
    older = predict_scene(Oracle(), scene, tmp_path / "maps").classes.read_bytes()

    def fail() -> None:
        raise failure

    model = Oracle()
    model.at[15] = fail
    with pytest.raises(failure):
        predict_scene(model, scene, tmp_path / "maps", batch=2, probabilities=True)
    assert model.calls == 15
    assert (tmp_path / "maps" / "scene_classes.tif").read_bytes() == older
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == [
        "scene_classes.qml", "scene_classes.tif", "scene_classes.tif.aux.xml",
    ]  # fmt: skip


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", labels(600, 600))
    size = predict_scene(Oracle(128), scene, tmp_path / "whole").classes.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for share in (0.2, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999):  # GDAL itself is silent about some of these
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), limits[1]))
            with pytest.raises(InputError, match=r"scene_classes.tif: cannot be written"):
                predict_scene(Oracle(128), scene, tmp_path / "maps")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((tmp_path / "maps").iterdir())


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from dctc.mapping.predict import predict_scene
from tests.system.oracle import Oracle
folder = Path(sys.argv[1])
peaks = []
for name in ("short", "tall"):
    predict_scene(Oracle(256), folder / f"{name}.tif", folder / name)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0], flush=True)
model = Oracle()
model.at[20] = lambda: os.kill(os.getpid(), signal.SIGKILL)
predict_scene(model, folder / "killed.tif", folder / "maps", batch=1)
"""
ROOT = Path(__file__).parents[2]


def test_memory_is_flat_in_height_and_a_killed_run_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    write_scene(tmp_path / "short.tif", labels(2_000, 256), tiled=True)
    write_scene(tmp_path / "tall.tif", labels(20_000, 256), tiled=True)
    scene = write_scene(tmp_path / "killed.tif", labels(300, 300))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert int(child.stdout) < 40 * 1024  # KiB; probabilities of the tall scene alone would be 117 MiB
    np.testing.assert_array_equal(read(tmp_path / "tall" / "tall_classes.tif"), read(tmp_path / "tall.tif"))

    left = [path.name for path in (tmp_path / "maps").iterdir()]
    assert left
    assert all(name.startswith(".") and name.endswith(".part") for name in left)
    again = predict_scene(Oracle(), scene, tmp_path / "maps").classes
    whole = predict_scene(Oracle(), scene, tmp_path / "whole").classes
    assert again.read_bytes() == whole.read_bytes()
    assert not [path.name for path in (tmp_path / "maps").iterdir() if path.name.startswith(".")]
