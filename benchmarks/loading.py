"""How fast are batches read? Against pure decoding, webdataset, MosaicML Streaming, LitData, and the source scenes.

    python -m benchmarks.loading --streaming-python VENV/bin/python --litdata-python VENV/bin/python --out FILE

Scenes and recipe are those of `benchmarks.sharding`; every row reads images and labels of 512 px tiles, every batch
has 8 of them. Peers are given the same encoded bytes and, unless a row says otherwise, decode them by our codec right
into the tensors of a batch, so that what differs is all else. None of them checks what it reads by a hash; we do.

In process, CPU milliseconds a tile, one after the other in each run:

- bytes only: the members' bytes. dctc by index in a shuffled order, crc32 checked; webdataset's own pipeline (shards
  shuffled, then a buffer of 100 samples) over the same tars, which hands out bytes.
- limit: the bytes at hand, decoded one by one into the same arrays; nothing is read, checked or put into a batch.
- dctc: `TileDataset`, as bytes only, decoded in place into batches.
- webdataset: the pipeline above, once with our codec, once decoding as docs/data.md shows, by rasterio.
- MosaicML, LitData: shuffled, by their datasets and loaders without workers, in environments of their own.
- sources: 64 random windows of image and label by rasterio, opened each time. What they read are colours; the second
  row of each layout also turns them into ids, as what we read is.

With DataLoader workers, tiles a second by the clock, after the first batches: dctc's `TrainingStream` without
augmentation, `webdataset.WebLoader`, and the peers' loaders, all of which end in `Normaliser` in the main process.

Limits, as multiples of our CPU time: pure decoding at least 0.9; webdataset at least 1.5 for bytes only and as its
users decode, 1 with our codec, where most of both is decoding; MosaicML and LitData 1; windows of sources 5. With
workers we are at least as fast as each peer. A limit of 1 holds from 0.95 on, for noise. An epoch's order of 10 million
tiles: below 3 s and 200 MB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import torch
import webdataset
from rasterio.io import MemoryFile
from rasterio.windows import Window
from torch import Tensor

from benchmarks.sharding import KINDS, TILE, Report, recipe, to_ids, write_scenes
from dctc.data.loaders import PREFETCH, DeviceBatch, Normaliser, StreamBatch, TrainingStream
from dctc.data.order import Layout
from dctc.data.tiles import TileDataset
from shards.codec import read_image, read_label
from shards.index import Index
from shards.manifest import IGNORE, Dataset
from shards.pack import pack

ROOT = Path(__file__).resolve().parents[1]
BATCH, BUFFER, WARM, WORKERS, NOISE, WINDOWS = 8, 100, 8, (1, 2), 0.95, 64
IMAGE, LABEL = "image.tif", "label.tif"
PEERS = {"streaming": ("MosaicML Streaming", "mosaicml-streaming"), "litdata": ("LitData", "litdata")}
ORDER = (
    "import numpy as np, time, tracemalloc; from dctc.data.order import {name}; order = {make}; tracemalloc.start(); "
    "start = time.perf_counter(); order.segment(0); "
    "print(time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 1e6)"
)
ORDERS = {
    "global": ("GlobalOrder", "GlobalOrder(10_000_000, 0, 1)", "an epoch"),
    "block": (
        "BlockOrder",
        "BlockOrder(np.arange(10_000_000, dtype=np.uint32) // 400, 0, 1, 64)",
        "its first 64 shards",
    ),
}
Sample = Mapping[str, bytes]
HostBatch = tuple[Tensor, Tensor, Tensor]


class Row(NamedTuple):
    """A line of the table: what it does, what it is compared with, the least multiple of that; tiles if not all."""

    name: str
    base: str | None = None
    bound: float | None = None
    tiles: int | None = None


def members(tiles: TileDataset, rows: Iterable[int]) -> Iterator[Sample]:
    """The checked bytes of images and labels."""
    for row in rows:
        yield {IMAGE: tiles._member(row, "image"), LABEL: tiles._member(row, "label")}


def exhaust(items: Iterable[object]) -> int:
    """The number of items."""
    return sum(1 for _ in items)


def decode_all(samples: list[Sample]) -> int:
    """The limit; the number of samples."""
    image, valid = np.empty((3, TILE, TILE), np.uint8), np.empty((TILE, TILE), bool)
    label = np.empty((TILE, TILE), np.uint8)
    for sample in samples:
        read_image("geotiff", sample[IMAGE], None, image, valid)
        read_label("geotiff", sample[LABEL], label)
    return len(samples)


def decode_batch(samples: Sequence[Sample]) -> HostBatch:
    """A batch by our codec, what a peer is given to decode with."""
    images, valid = np.empty((len(samples), 3, TILE, TILE), np.uint8), np.empty((len(samples), TILE, TILE), bool)
    labels = np.empty((len(samples), TILE, TILE), np.uint8)
    for slot, sample in enumerate(samples):
        read_image("geotiff", sample[IMAGE], None, images[slot], valid[slot])
        read_label("geotiff", sample[LABEL], labels[slot])
    return torch.from_numpy(images), torch.from_numpy(valid), torch.from_numpy(labels)


def decode_as_users_do(sample: Sample) -> tuple[Any, Any, Any]:
    """As docs/data.md shows."""
    with MemoryFile(sample[IMAGE]) as file, file.open() as raster:
        image, valid = raster.read(), raster.dataset_mask() > 0
    with MemoryFile(sample[LABEL]) as file, file.open() as raster:
        return image, valid, raster.read(1)


def by_index(tiles: TileDataset, rows: list[int]) -> int:
    """Batches as the trainer's loader makes them; the number of tiles."""
    starts = range(0, len(rows), BATCH)
    return sum(len(tiles.__getitems__(list(enumerate(rows[s : s + BATCH])))["rows"]) for s in starts)


def tars(urls: list[str]) -> Any:
    """webdataset's pipeline of samples, shuffled."""
    return webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(BUFFER)


def count(batches: Iterable[Sequence[Any]]) -> int:
    """The number of tiles in batches."""
    return sum(len(batch[0]) for batch in batches)


def by_source(pairs: list[tuple[Path, Path]], number: int, ids: bool) -> int:
    """``number`` random windows of scenes and their colours, perhaps turned into class ids."""
    chooser = random.Random(0)
    for _ in range(number):
        image, label = chooser.choice(pairs)
        with rasterio.open(image) as source:
            corner = chooser.randrange(source.width - TILE), chooser.randrange(source.height - TILE)
            source.read(window=Window(*corner, TILE, TILE))
        with rasterio.open(label) as source:
            colors = source.read(window=Window(*corner, TILE, TILE))
        if ids:
            to_ids(colors)
    return number


def on_device(batches: Iterable[HostBatch], dataset: Dataset) -> Iterator[DeviceBatch]:
    """A peer's batches made what `TrainingStream` yields."""
    normaliser = Normaliser.of(dataset.manifest, torch.device("cpu"))
    for images, valid, labels in batches:
        yield normaliser(images, valid), valid, torch.where(valid, labels.long(), IGNORE)


def training_stream(dataset: Dataset, rounds: int, workers: int) -> Iterator[list[StreamBatch]]:
    """The trainer's stream of all tiles."""
    rows = np.arange(len(Index.open(dataset)), dtype=np.int64)
    stream = TrainingStream(dataset, 0, rows, BATCH, 0, Layout(), "none", workers, labels=True)
    return stream.batches(range(rounds), torch.device("cpu"))


def web_loader(urls: list[str], workers: int) -> Iterable[HostBatch]:
    """webdataset's loader; each worker begins its shards anew when it has read them, so that none waits for another."""
    stream = tars(urls).batched(BATCH, collation_fn=decode_batch, partial=False).repeat()
    loader: Iterable[HostBatch] = webdataset.WebLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH
    )
    return loader


def pace(batches: Iterable[object], number: int) -> tuple[float, float]:
    """Tiles a second of ``number`` batches after the first :data:`WARM`, and the seconds until the first one."""
    start = time.perf_counter()
    iterator = iter(batches)
    next(iterator)
    first = time.perf_counter() - start
    assert exhaust(islice(iterator, WARM - 1)) == WARM - 1
    start = time.perf_counter()
    assert exhaust(islice(iterator, number)) == number
    return number * BATCH / (time.perf_counter() - start), first


def cpu(task: Callable[[], int], number: int) -> float:
    """CPU milliseconds a tile of this process, which must read ``number`` of them."""
    start = time.process_time()
    seen = task()
    spent = time.process_time() - start
    assert seen == number, f"{seen} tiles instead of {number}"
    return 1000 * spent / number


def ask_peer(python: str, name: str, place: Path, out: Path, workers: int) -> Any:
    """What `benchmarks.loading_peers` prints."""
    command = [python, "-W", "ignore", "-m", "benchmarks.loading_peers", name, str(place), str(out), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    if done.returncode:
        raise SystemExit(f"{PEERS[name][0]} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def version(python: str, name: str) -> str:
    """The version of a peer in its environment."""
    ask = f"import importlib.metadata as m; print(m.version({PEERS[name][1]!r}))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def tasks(dataset: Dataset, images: dict[str, list[Path]]) -> dict[Row, Callable[[], int]]:
    """What is measured in this process, by line."""
    tiles = TileDataset(dataset, labels=True)
    rows = np.random.default_rng(0).permutation(len(tiles)).tolist()
    samples = list(members(tiles, rows))
    urls = [str(dataset.root / shard.name) for shard in dataset.manifest.shards]
    found: dict[Row, Callable[[], int]] = {
        Row("bytes only, dctc by index"): lambda: exhaust(members(tiles, rows)),
        Row("bytes only, webdataset", "bytes only, dctc by index", 1.5): lambda: exhaust(tars(urls)),
        Row("limit: pure decoding", "dctc by index", 0.9): lambda: decode_all(samples),
        Row("dctc by index"): lambda: by_index(tiles, rows),
        Row("webdataset, our codec", "dctc by index", 1): lambda: count(
            tars(urls).batched(BATCH, collation_fn=decode_batch)
        ),
        Row("webdataset, rasterio", "dctc by index", 1.5): lambda: count(
            tars(urls).map(decode_as_users_do).batched(BATCH)
        ),
    }
    for kind, paths in images.items():
        pairs = [(path, Path(str(path).replace("_image", "_label"))) for path in paths]
        found[Row(f"source, {kind}", "dctc by index", 5, WINDOWS)] = partial(by_source, pairs, WINDOWS, False)
        found[Row(f"source, {kind}, to ids", "dctc by index", None, WINDOWS)] = partial(by_source, pairs, WINDOWS, True)
    return found


def judge(ratio: float, bound: float | None) -> tuple[str, bool]:
    """The end of a line, and whether its limit holds."""
    if bound is None:
        return f"{ratio:6.2f} x", True
    holds = ratio >= (NOISE if bound == 1 else bound)
    return f"{ratio:6.2f} x, limit {bound}: {'holds' if holds else 'MISSED'}", holds


def show_cpu(times: dict[Row, list[float]], missing: list[str], emit: Report) -> bool:
    """The table of one process."""
    emit(f"\n{'in process, CPU ms a tile':36}{'median':>9}   against dctc")
    medians = {row.name: statistics.median(found) for row, found in times.items()}
    good = True
    for row in times:
        verdict, holds = judge(medians[row.name] / medians[row.base], row.bound) if row.base else ("", True)
        good &= holds
        emit(f"{row.name:36}{medians[row.name]:9.3f} {verdict}".rstrip())
    for name in missing:
        emit(f"{name:36} not installed here")
    return good


def show_pace(paces: dict[tuple[str, int], list[tuple[float, float]]], missing: list[str], emit: Report) -> bool:
    """The table of loaders with workers."""
    emit(f"\n{'with workers, tiles a second':36}{'median':>9}   dctc against it; the first batch after")
    good = True
    medians = {key: [statistics.median(part) for part in zip(*found, strict=True)] for key, found in paces.items()}
    for workers in WORKERS:
        for (name, number), (speed, first) in medians.items():
            if number != workers:
                continue
            verdict, holds = ("", True) if name == "dctc" else judge(medians["dctc", workers][0] / speed, 1)
            good &= holds
            emit(f"{f'{name}, workers: {workers}':36}{speed:9.1f} {verdict:30}{first:6.1f} s")
        for name in missing:
            emit(f"{f'{name}, workers: {workers}':36} not installed here")
    return good


def show_orders(emit: Report) -> bool:
    """Time and memory of the order of an epoch."""
    good = True
    emit("")
    for kind, (name, make, what) in ORDERS.items():
        command = [sys.executable, "-c", ORDER.format(name=name, make=make)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, megabytes = map(float, done.stdout.split())
        holds = seconds < 3 and megabytes < 200
        good &= holds
        emit(
            f"order {kind}, 10 million tiles, {what}: {seconds:.2f} s, {megabytes:.0f} MB; limit 3 s, 200 MB: "
            f"{'holds' if holds else 'MISSED'}"
        )
    return good


def measure(folder: Path, options: argparse.Namespace, pythons: dict[str, str], emit: Report) -> bool:
    """Write the data, run everything in turns, print the tables; whether the limits hold."""
    images = {k: write_scenes(folder / k.replace(" ", "_"), k, options.scenes, options.size) for k in KINDS}
    dataset = pack(recipe("rgb"), folder / "tiled_deflate", folder / "set", workers=2)
    number, shards = len(Index.open(dataset)), dataset.manifest.shards
    emit(
        f"{options.scenes} scenes of {options.size} px: {number} tiles of {TILE} px, uint8, 3 bands, with labels, "
        f"{sum(s.bytes for s in shards) / 1e6:.0f} MB in {len(shards)} shards; medians of {options.runs} runs"
    )
    urls = [str(dataset.root / shard.name) for shard in shards]
    rounds = number // BATCH - WARM
    if rounds < 1 or len(shards) < max(WORKERS):
        raise SystemExit("too few tiles: make --scenes or --size larger")
    here = tasks(dataset, images)
    times: dict[Row, list[float]] = defaultdict(list)
    paces: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for run in range(options.runs + 1):
        if run == 1:  # the first run warms up
            times.clear()
            paces.clear()
        for row, task in here.items():
            times[row].append(cpu(task, row.tiles or number))
        for workers in WORKERS:
            paces["dctc", workers].append(pace(training_stream(dataset, rounds + WARM, workers), rounds))
            paces["webdataset", workers].append(pace(on_device(web_loader(urls, workers), dataset), rounds))
        for name, python in pythons.items():
            ask = partial(ask_peer, python, name, dataset.root, folder / name)
            times[Row(f"{PEERS[name][0]}, our codec", "dctc by index", 1)].append(ask(0))
            for workers in WORKERS:
                paces[PEERS[name][0], workers].append(tuple(ask(workers)))
    missing = [title for name, (title, _) in PEERS.items() if name not in pythons]
    return bool(show_cpu(times, missing, emit) & show_pace(paces, missing, emit) & show_orders(emit))


def main() -> int:
    """Print the tables; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description="Reading batches against its limit and against peers")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--size", type=int, default=6000, help="pixels of a scene")
    parser.add_argument("--runs", type=int, default=5)
    for name, (title, package) in PEERS.items():
        parser.add_argument(f"--{name}-python", help=f"{title}: an interpreter that has {package}, and what dctc needs")
    parser.add_argument("--out", type=Path, help="write what is printed into this file, too")
    options = parser.parse_args()
    pythons = {name: found for name in PEERS if (found := getattr(options, f"{name}_python"))}
    emit = Report()
    emit(f"command: python -m benchmarks.loading {' '.join(sys.argv[1:])}")
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} at the start"
    emit(f"date {time.strftime('%Y-%m-%d')}, {machine}")
    versions = [f"{n} {importlib.metadata.version(n)}" for n in ("rasterio", "numpy", "torch", "webdataset")]
    versions += [f"{PEERS[name][1]} {version(python, name)}" for name, python in pythons.items()]
    emit(f"Python {platform.python_version()}, GDAL {rasterio.__gdal_version__}, {', '.join(versions)}")
    with tempfile.TemporaryDirectory() as folder:
        holds = measure(Path(folder), options, pythons, emit)
    emit("\nthe limits hold" if holds else "\nSOME LIMITS ARE MISSED")
    if options.out is not None:
        options.out.write_text("\n".join(emit.lines) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
