"""The ways to a scene's map that `benchmarks.predict` compares, each in a process of its own that waits for lines.

    PYTHON -m benchmarks.predict_ways WAY SCENE MODEL FOLDER JSON-OF-SETTING

Each line read on standard input is one repeat: the whole map from opening the scene to the last byte written, and as
JSON its seconds by the clock and of the processor (child processes included, once they have ended).
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from dctc.bundle import Bundle
from dctc.mapping.predict import predict_scene
from dctc.mapping.windows import Grid

BLOCK = 256  # side of the map's internal tiles, as dctc writes them


@dataclass(frozen=True)
class Setting:
    """What all ways have in common.

    Attributes:
        overlap: share of a window's side that neighbours share.
        batch: windows in one forward pass, of the ways that have batches.
        threads: of torch.
        device: torch's name of it.
        workers: processes of a DataLoader, of the ways that have one.
    """

    overlap: float
    batch: int
    threads: int
    device: str
    workers: int


@dataclass(frozen=True)
class Job:
    """One scene, one model, and where the map goes."""

    scene: Path
    model: Bundle
    out: Path
    setting: Setting

    def logits(self, images: Tensor) -> Tensor:
        """The headline net's, of windows in the scene's units."""
        return self.model.logits(images)[self.model.headline]

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.setting.device.startswith("cuda"):
            torch.cuda.synchronize()


def forward_alone(job: Job) -> Callable[[], None]:
    """The net on the windows that dctc predicts, which lie in the device's memory: no file, no softmax, no blending."""
    with rasterio.open(job.scene) as source:
        image = source.read()
        grid = Grid.over(source.height, source.width, job.model.tile_size, job.setting.overlap)
    windows = np.stack([
        image[:, top : top + grid.tile, left : left + grid.tile] for top in grid.tops for left in grid.lefts
    ])  # fmt: skip
    held = torch.from_numpy(windows).to(job.setting.device)

    def run() -> None:
        # dctc's own batches, which end with a row: a CPU is faster with fewer windows at once
        for row in held.split(len(grid.lefts)):  # type: ignore[no-untyped-call]  # torch has no types for it
            for some in row.split(job.setting.batch):
                job.logits(some)
        job.wait()

    return run


def dctc(job: Job) -> Callable[[], None]:
    """`predict_scene`, as the command calls it."""

    def run() -> None:
        setting = job.setting
        predict_scene(
            job.model, job.scene, job.out, overlap=setting.overlap, batch=setting.batch, device=setting.device
        )

    return run


def profile_of(source: Any) -> dict[str, Any]:
    """A plain tiled map on the scene's grid: no overviews, not cloud-optimised."""
    return {
        "driver": "GTiff", "height": source.height, "width": source.width, "count": 1, "dtype": "uint8", "nodata": 255,
        "crs": source.crs, "transform": source.transform, "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK,
        "compress": "deflate",
    }  # fmt: skip


def plain_tiles(job: Job) -> Callable[[], None]:
    """Read a window, forward, argmax, write the window; no overlap, the last ones of a row or column filled with 0."""
    tile = job.model.tile_size

    def run() -> None:
        with rasterio.open(job.scene) as source, rasterio.open(job.out / "map.tif", "w", **profile_of(source)) as out:
            for top in range(0, source.height, tile):
                for left in range(0, source.width, tile):
                    window = Window(left, top, min(tile, source.width - left), min(tile, source.height - top))
                    image = np.zeros((source.count, tile, tile), source.dtypes[0])
                    image[:, : window.height, : window.width] = source.read(window=window)
                    ids = ids_of(job, image)
                    out.write(ids[: window.height, : window.width], 1, window=window)

    return run


def ids_of(job: Job, image: NDArray[Any]) -> NDArray[np.uint8]:
    """Class ids [H,W] of one window [C,H,W]."""
    found: NDArray[np.uint8] = job.logits(torch.from_numpy(image)[None])[0].argmax(0).to(torch.uint8).cpu().numpy()
    return found


def cores(starts: tuple[int, ...], tile: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Of each window of a side: its start, and from where to where it is written, the middles of the overlaps."""
    middles = [(start + before + tile) // 2 for before, start in itertools.pairwise(starts)]
    yield from zip(starts, [0, *middles], [*middles, size], strict=True)


def plain_overlap(job: Job) -> Callable[[], None]:
    """The same loop with dctc's windows: the core of each is written, its rim is cut off. No blending."""

    def run() -> None:
        with rasterio.open(job.scene) as source, rasterio.open(job.out / "map.tif", "w", **profile_of(source)) as out:
            grid = Grid.over(source.height, source.width, job.model.tile_size, job.setting.overlap)
            for top, first, last in cores(grid.tops, grid.tile, grid.height):
                for left, begin, end in cores(grid.lefts, grid.tile, grid.width):
                    ids = ids_of(job, source.read(window=Window(left, top, grid.tile, grid.tile)))
                    place = Window(begin, first, end - begin, last - first)
                    out.write(ids[first - top : last - top, begin - left : end - left], 1, window=place)

    return run


def torchgeo(job: Job) -> Callable[[], None]:
    """torchgeo's RasterDataset, GridGeoSampler and stack_samples in a DataLoader, and a mean over all windows.

    The library brings the windows; what its users do with them is theirs: here probabilities are added up over the
    whole scene, as many as there are classes, and divided by how often each pixel was seen.
    """
    datasets, samplers = (importlib.import_module(f"torchgeo.{name}") for name in ("datasets", "samplers"))
    tile = job.model.tile_size
    stride = tile - round(job.setting.overlap * tile)

    def run() -> None:
        data = datasets.RasterDataset(str(job.scene))
        loader: Any = torch.utils.data.DataLoader(
            data, batch_size=job.setting.batch, sampler=samplers.GridGeoSampler(data, size=tile, stride=stride),
            collate_fn=datasets.stack_samples, num_workers=job.setting.workers,
        )  # fmt: skip
        with rasterio.open(job.scene) as source:
            profile, to_pixels = profile_of(source), ~source.transform
        rows, columns = profile["height"], profile["width"]
        total = np.zeros((len(job.model.classes), rows, columns), np.float32)
        seen = np.zeros((rows, columns), np.float32)
        for batch in loader:
            probabilities = job.logits(batch["image"]).softmax(1).cpu().numpy()
            for window, (x, y, _) in zip(probabilities, batch["bounds"], strict=True):
                left, top = (round(value) for value in to_pixels * (x.start, y.stop))
                into = np.s_[max(0, top) : min(rows, top + tile), max(0, left) : min(columns, left + tile)]
                of = np.s_[:, into[0].start - top : into[0].stop - top, into[1].start - left : into[1].stop - left]
                total[:, *into] += window[of]
                seen[into] += 1
        with rasterio.open(job.out / "map.tif", "w", **profile) as out:
            out.write((total / seen).argmax(0).astype(np.uint8), 1)

    return run


WAYS: dict[str, Callable[[Job], Callable[[], None]]] = {
    "forward": forward_alone, "dctc": dctc, "plain": plain_tiles, "plain overlap": plain_overlap, "torchgeo": torchgeo,
}  # fmt: skip


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return math.fsum(os.times()[:4])


def main(way: str, scene: str, model: str, folder: str, setting: str) -> None:
    """Repeat a way as often as it is asked for."""
    chosen = Setting(**json.loads(setting))
    torch.set_num_threads(chosen.threads)
    out = Path(folder)
    out.mkdir(exist_ok=True)
    run = WAYS[way](Job(Path(scene), Bundle.load(model, chosen.device), out, chosen))
    print("ready", flush=True)
    with torch.inference_mode():
        for _ in sys.stdin:
            start, used = time.perf_counter(), processor_seconds()
            run()
            print(json.dumps([time.perf_counter() - start, processor_seconds() - used]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
