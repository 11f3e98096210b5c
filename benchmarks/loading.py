"""How fast are decoded batches read? Against pure decoding, webdataset's own pipeline, and reads of the source scenes.

    python benchmarks/loading.py --out benchmarks/results/loading.txt

Synthetic towns (`shards.synth`), packed into 512 px tiles; every row reads images and labels of the same number of
tiles. CPU milliseconds a tile, medians of the runs; rows of one run follow each other, so noise meets all of them.

- limit: the members' bytes at hand, decoded one by one; nothing is read, checked or put into a batch.
- dctc: `TileDataset`, random access by the index in a shuffled order, crc checked, decoded in place into batches.
- webdataset: its own pipeline over the same tars (shard shuffle, buffer of 100), decoding with the same codec.
- sources: random 512 px windows of image and label by rasterio, scenes as striped LZW and as tiled deflate.

Limits to hold: at least 90 % of pure decoding; webdataset at least 1.5 times the CPU; sources at least 5 times; the
order of an epoch of 10 million tiles below 3 s and 200 MB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import webdataset
from rasterio.windows import Window

from dctc.data.tiles import TileDataset
from shards.codec import decode_image, decode_label, read_image, read_label
from shards.index import Index
from shards.manifest import Dataset
from shards.pack import pack
from shards.recipe import load_recipe
from shards.synth import write_scenes

TILE, BATCH = 512, 8
RECIPE = Path(__file__).resolve().parents[1] / "configs" / "data" / "synthetic.yaml"
KINDS: dict[str, dict[str, Any]] = {
    "striped LZW": {"compress": "lzw", "tiled": False},
    "tiled deflate": {"compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256},
}
ORDER = (
    "import numpy as np, time, tracemalloc; from dctc.data.order import {name}; order = {make}; tracemalloc.start(); "
    "start = time.perf_counter(); order.segment(0); "
    "print(time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 1e6)"
)
ORDERS = {
    "global": ("GlobalOrder", "GlobalOrder(10_000_000, 0, 1)"),
    "block": ("BlockOrder", "BlockOrder(np.arange(10_000_000, dtype=np.uint32) // 400, 0, 1, 64)"),
}


def cpu(function: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def members(dataset: Dataset, rows: list[int]) -> list[tuple[bytes, bytes]]:
    """The bytes of images and labels."""
    index, found = Index.open(dataset), []
    for row in rows:
        with dataset.open_shard(int(index.shard[row])) as file:
            pair = []
            for what in ("image", "label"):
                file.seek(int(getattr(index, f"{what}_offset")[row]))
                pair.append(file.read(int(getattr(index, f"{what}_size")[row])))
            found.append((pair[0], pair[1]))
    return found


def decode_all(pairs: list[tuple[bytes, bytes]], bands: int) -> None:
    """The limit."""
    image, valid = np.empty((bands, TILE, TILE), np.uint8), np.empty((TILE, TILE), bool)
    label = np.empty((TILE, TILE), np.uint8)
    for data, mask in pairs:
        read_image("geotiff", data, None, image, valid)
        read_label("geotiff", mask, label)


def by_index(tiles: TileDataset, rows: list[int]) -> None:
    """Batches as the trainer's loader makes them."""
    for start in range(0, len(rows), BATCH):
        tiles.__getitems__(list(enumerate(rows[start : start + BATCH])))


def by_webdataset(urls: list[str], count: int) -> None:
    """webdataset's pipeline, batched."""
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(100)
    stream = stream.map(
        lambda s: (decode_image(s["image.tif"], "geotiff", None)[0], decode_label(s["label.tif"], "geotiff"))
    )
    seen = sum(len(batch[0]) for batch in stream.batched(BATCH))
    assert seen == count, f"{seen} tiles instead of {count}"


def by_source(pairs: list[tuple[Path, Path]], count: int) -> None:
    """Random windows of the scenes."""
    chooser = random.Random(0)
    for _ in range(count):
        for number, path in enumerate(chooser.choice(pairs)):
            with rasterio.open(path) as source:
                if number == 0:
                    corner = chooser.randrange(source.width - TILE), chooser.randrange(source.height - TILE)
                source.read(window=Window(*corner, TILE, TILE))


def rewritten(scenes: Path, folder: Path, options: dict[str, Any]) -> list[tuple[Path, Path]]:
    """Images and labels of the scenes in another layout."""
    pairs = []
    for image in sorted(scenes.rglob("*_RGB.tif")):
        label = next(scenes.rglob(image.name.replace("_RGB", "_label")))
        pair = []
        for path in (image, label):
            with rasterio.open(path) as source:
                profile = source.profile
                for key in ("blockxsize", "blockysize", "tiled", "predictor", "compress"):
                    profile.pop(key, None)
                target = folder / path.name
                with rasterio.open(target, "w", **(profile | options)) as written:
                    written.write(source.read())
            pair.append(target)
        pairs.append((pair[0], pair[1]))
    return pairs


def main() -> int:
    """Print the table; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}, "
        + ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("rasterio", "numpy", "torch", "webdataset"))
    ]
    good = True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_scenes(folder / "scenes", scenes=options.scenes, size=options.size, seed=0)
        recipe = load_recipe(RECIPE, [f"tile.size={TILE}", "splits.scene={train: ['*']}", "shards.megabytes=4"])
        dataset = pack(recipe, folder / "scenes", folder / "set", workers=2)
        rows = np.random.default_rng(0).permutation(len(Index.open(dataset))).tolist()
        pairs, tiles = members(dataset, rows), TileDataset(dataset, labels=True)
        urls = [str(folder / "set" / shard.name) for shard in dataset.manifest.shards]
        sources = {}
        for kind, layout in KINDS.items():
            (folder / kind).mkdir()
            sources[kind] = rewritten(folder / "scenes", folder / kind, layout)
        tasks: dict[str, Callable[[], object]] = {
            "limit: pure decoding": lambda: decode_all(pairs, 3),
            "dctc, by index": lambda: by_index(tiles, rows),
            "webdataset pipeline": lambda: by_webdataset(urls, len(rows)),
            **{f"source, {kind}": partial(by_source, found, len(rows)) for kind, found in sources.items()},
        }
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(options.runs + 1):
            for name, task in tasks.items():
                times[name].append(1000 * cpu(task) / len(rows))
        medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first run warms up
        own = medians["dctc, by index"]
        lines += [
            f"{len(rows)} tiles of {TILE} px, uint8, 3 bands, with labels; CPU ms a tile, medians of {options.runs}",
            "",
        ]
        bounds = {"limit: pure decoding": 0.9, "webdataset pipeline": 1.5} | {f"source, {k}": 5.0 for k in KINDS}
        for name, found in medians.items():
            bound = bounds.get(name)
            ratio = found / own
            verdict = (
                ""
                if bound is None
                else f"  {ratio:5.2f} x dctc, limit {bound}: {'holds' if ratio >= bound else 'MISSED'}"
            )
            good &= bound is None or ratio >= bound
            lines.append(f"{name:24} {found:8.3f}{verdict}")
    for kind, (name, make) in ORDERS.items():
        done = subprocess.run(
            [sys.executable, "-c", ORDER.format(name=name, make=make)], capture_output=True, text=True, check=True
        )
        seconds, megabytes = map(float, done.stdout.split())
        holds = seconds < 3 and megabytes < 200
        good &= holds
        verdict = "hold" if holds else "MISSED"
        what = "an epoch" if kind == "global" else "its first 64 shards"
        lines.append(
            f"order {kind}, 10 million tiles, {what}: {seconds:.2f} s, {megabytes:.0f} MB; 3 s, 200 MB {verdict}"
        )
    lines.append(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
