"""How fast is packing? Against its limit, the sum of reading and encoding the same tiles, and against peers.

    python benchmarks/sharding.py --streaming-python VENV/bin/python --big --out benchmarks/results/sharding.txt

Scenes are procedural towns (`shards.synth`) with sensor noise, as striped LZW and as tiled deflate GeoTIFFs, with
colour masks. Everything encodes tiles by the same codec, so that what differs is all else:

- limit: each source block read once, colours turned into ids, each tile and label encoded, on one core; nothing is
  written.
- dctc: `shards.pack`, with hashes of inputs and outputs, statistics, splits, index, synced files.
- webdataset: `webdataset.ShardWriter` fed window by window from rasterio, what most people write themselves.
- MDS: the same loop into MosaicML Streaming's `MDSWriter`, in an environment of its own (--streaming-python).

The peers write what they are given: no hash of an input, no statistics, no split, no resuming, one process. Limits to
hold: one worker at least 80 % of the limit in CPU seconds; two workers at least 1.7 times one, or 85 % of what two
independent encoding processes reach on this machine; below 1 GiB a worker.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.transform import Affine
from rasterio.windows import Window

from shards.codec import encode_image, encode_label
from shards.pack import pack
from shards.recipe import Recipe
from shards.synth import render

TILE = 512
PALETTE = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 255], [0, 255, 0], [255, 255, 0], [255, 0, 0]], np.uint8)
KINDS: dict[str, dict[str, Any]] = {
    "striped LZW": {"compress": "lzw"},
    "tiled deflate": {"compress": "deflate", "predictor": 2, "tiled": True, "blockxsize": 256, "blockysize": 256},
}
LIMIT_SHARE, LIMIT_SPEEDUP, LIMIT_OF_MACHINE, LIMIT_BYTES = 0.8, 1.7, 0.85, 2**30
BIG = 20_000


def recipe(bands: str) -> Recipe:
    """Scenes `NAME_image.tif` with `NAME_label.tif`; tiles are drawn, so that any number of scenes will do."""
    return Recipe.model_validate(
        {
            "name": "bench",
            "image": {"pattern": r"(?P<scene>\w+)_image\.tif"},
            "label": {"pattern": r"(?P<scene>\w+)_label\.tif"},
            "bands": {"names": list(bands)},
            "classes": [{"name": f"c{k}", "color": color.tolist()} for k, color in enumerate(PALETTE)],
            "tile": {"size": TILE},
            "splits": {"protocol": "paper"},
            "shards": {"megabytes": 32},  # enough shards to share among workers
        }
    )


def write_scenes(folder: Path, kind: str, count: int, size: int) -> list[Path]:
    """``count`` scenes of size x size pixels; their images."""
    folder.mkdir(parents=True)
    side = 1024
    for number in range(count):
        town, ids = render(0, number, side)
        repeat = -(-size // side)
        noise = np.random.default_rng(number).integers(-2, 3, (3, size, size), dtype=np.int16)
        image = np.tile(np.moveaxis(town, -1, 0), (1, repeat, repeat))[:, :size, :size] + noise
        colors = np.moveaxis(PALETTE[np.tile(ids, (repeat, repeat))[:size, :size]], -1, 0)
        for name, pixels in (("image", image.clip(0, 255).astype(np.uint8)), ("label", colors)):
            profile = {"driver": "GTiff", "count": 3, "height": size, "width": size, "dtype": "uint8"}
            place = {"crs": "EPSG:32633", "transform": Affine(0.05, 0, 4e5 + number * 1e3, 0, -0.05, 5.8e6)}
            with rasterio.open(folder / f"s{number}_{name}.tif", "w", **profile, **place, **KINDS[kind]) as target:
                target.write(pixels)
    return sorted(folder.glob("*_image.tif"))


def to_ids(colors: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Class ids of exact colours [3,H,W]."""
    packed = colors[0].astype(np.int32) << 16 | colors[1].astype(np.int32) << 8 | colors[2]
    ids = np.full(packed.shape, 255, np.uint8)
    for k, (red, green, blue) in enumerate(PALETTE.astype(int).tolist()):
        ids[packed == red << 16 | green << 8 | blue] = k
    return ids


def tiles(images: list[Path], once: bool) -> Iterator[tuple[str, npt.NDArray[Any], npt.NDArray[Any], str, Affine]]:
    """Key, image and colours of each tile, CRS and transform; ``once`` reads whole rows of tiles, each block once."""
    for path in images:
        with rasterio.open(path) as image, rasterio.open(str(path).replace("_image", "_label")) as label:
            wkt = image.crs.to_wkt()
            for row in range(0, image.height, TILE):
                rows = Window(0, row, image.width, TILE)
                whole = [source.read(window=rows) for source in (image, label)] if once else []
                for col in range(0, image.width, TILE):
                    if once:
                        pixels, colors = (np.ascontiguousarray(band[:, :, col : col + TILE]) for band in whole)
                    else:
                        pixels, colors = (s.read(window=Window(col, row, TILE, TILE)) for s in (image, label))
                    transform = image.transform * Affine.translation(col, row)
                    yield f"{path.stem}_r{row:05d}_c{col:05d}", pixels, colors, wkt, transform


def limit(images: list[Path]) -> tuple[float, float, float]:
    """CPU seconds of reading, of turning colours into ids, and of encoding."""
    marks = [time.process_time()]
    for _, pixels, colors, wkt, transform in tiles(images, once=True):
        marks.append(time.process_time())
        ids = to_ids(colors)
        marks.append(time.process_time())
        encode_image(pixels, None, wkt, transform)
        encode_label(ids, wkt, transform)
        marks.append(time.process_time())
    spent = np.diff(marks[: len(marks) // 3 * 3 + 1]).reshape(-1, 3).sum(axis=0)
    return float(spent[0]), float(spent[1]), float(spent[2])


def loop(images: list[Path]) -> Iterator[dict[str, Any]]:
    """Samples as a plain loop makes them."""
    for key, pixels, colors, wkt, transform in tiles(images, once=False):
        meta = {"crs": wkt, "transform": list(transform)[:6]}
        yield {
            "__key__": key,
            "image.tif": encode_image(pixels, None, wkt, transform),
            "label.tif": encode_label(to_ids(colors), wkt, transform),
            "meta.json": json.dumps(meta).encode(),
        }


def webdataset_loop(webdataset: Any, images: list[Path], out: Path) -> None:
    """The peer that packs into the same format."""
    out.mkdir()
    with webdataset.ShardWriter(str(out / "train-%06d.tar"), maxsize=256 * 2**20, verbose=0) as writer:
        for sample in loop(images):
            writer.write(sample)


def streaming_loop(streaming: Any, images: list[Path], out: Path) -> None:
    """The peer with a format of its own."""
    columns = {"key": "str", "image": "bytes", "label": "bytes", "meta": "bytes"}
    with streaming.MDSWriter(out=str(out), columns=columns, size_limit=256 * 2**20) as writer:
        for sample in loop(images):
            writer.write(dict(zip(columns, sample.values(), strict=True)))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call; the CPU seconds are those of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def packed(root: Path, out: Path, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of packing anew."""
    shutil.rmtree(out, ignore_errors=True)
    return timed(lambda: pack(recipe("rgb"), root, out, workers=workers))


def encode_only(images: list[str]) -> float:
    """Wall seconds of a process that reads one row of tiles and then encodes it again and again."""
    samples = [sample for _, sample in zip(range(6), tiles([Path(p) for p in images], once=True), strict=False)]
    start = time.perf_counter()
    for _ in range(25):
        for _, pixels, _, wkt, transform in samples:
            encode_image(pixels, None, wkt, transform)
    return time.perf_counter() - start


def machine_speedup(images: list[Path]) -> float:
    """What two independent encoding processes reach together, as a multiple of one."""
    names = [[str(path) for path in images[:1]]]
    with get_context("spawn").Pool(2) as pool:
        pool.map(encode_only, names * 2, chunksize=1)  # starts both
        alone = pool.map(encode_only, names, chunksize=1)[0]
        both = pool.map(encode_only, names * 2, chunksize=1)
    return 2 * alone / max(both)


class Report:
    """Prints lines as they come and keeps them for the result file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def compare(kind: str, folder: Path, options: argparse.Namespace, emit: Report) -> bool:
    """One kind of source: the table, and whether the limits hold."""
    root = folder / kind.replace(" ", "_")
    images = write_scenes(root, kind, options.scenes, options.size)
    count = len(images) * (-(-options.size // TILE)) ** 2
    webdataset = importlib.import_module("webdataset")
    limits, ones, twos, peers, machine = [], [], [], [], []
    streams: list[tuple[float, float]] = []
    limit(images[:1])  # warm
    for number in range(options.repeat):  # in turns, so that a busy moment of the machine does not hit one of them only
        limits.append(limit(images))
        ones.append(packed(root, folder / "one", 1))
        machine.append(machine_speedup(images))
        twos.append(packed(root, folder / "two", 2)[0])
        tars = folder / f"{root.name}-wds-{number}"
        peers.append(timed(functools.partial(webdataset_loop, webdataset, images, tars)))
        if options.streaming_python:
            streams.append(other_python(options.streaming_python, root, folder / f"{root.name}-mds-{number}"))
    read, colors, encode = (statistics.median(part) for part in zip(*limits, strict=True))
    bound, wall = read + colors + encode, min(ones)[0]
    cpu = statistics.median(cpu for _, cpu in ones)
    emit(f"\n{kind}: {len(images)} scenes of {options.size} px, {count} tiles; ms a tile")
    emit(f"{'':34}{'CPU':>7}{'wall':>7}{'tiles/s':>9}   of the limit")
    show(emit, "limit: read, ids, encode, one core", bound, None, count, bound)
    show(emit, "dctc, 1 worker", cpu, wall, count, bound)
    show(emit, "dctc, 2 workers", None, min(twos), count, bound)
    show(emit, "webdataset.ShardWriter in a loop", *_typical(peers), count, bound)
    if streams:
        show(emit, "MosaicML MDSWriter in a loop", *_typical(streams), count, bound)
    emit(f"read {read / count * 1e3:.2f}, colours to ids {colors / count * 1e3:.2f}, encode {encode / count * 1e3:.2f}")
    emit(f"without colours to ids in the limit, one worker would reach {(read + encode) / cpu:.0%} of it")
    emit(f"1 -> 2 workers: {wall / min(twos):.2f} x; two independent encoding processes here: {max(machine):.2f} x")
    fast = bound / cpu >= LIMIT_SHARE
    scales = wall / min(twos) >= min(LIMIT_SPEEDUP, LIMIT_OF_MACHINE * max(machine))
    emit(f"1 worker at {LIMIT_SHARE:.0%} of the limit: {_verdict(fast)}")
    emit(f"2 workers at {LIMIT_SPEEDUP} x one, or {LIMIT_OF_MACHINE:.0%} of the machine's: {_verdict(scales)}")
    shutil.rmtree(root)
    return fast and scales


def _typical(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Median CPU and least wall seconds."""
    return statistics.median(cpu for _, cpu in runs), min(runs)[0]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def show(emit: Report, what: str, cpu: float | None, wall: float | None, count: int, bound: float) -> None:
    """A row; without wall seconds the CPU seconds stand for them."""
    seconds = wall if wall is not None else cpu or 0
    parts = ["" if value is None else f"{value / count * 1e3:.2f}" for value in (cpu, wall)]
    share = f"{bound / cpu:.0%} of CPU" if cpu else f"{bound / seconds:.2f} x"
    emit(f"{what:34}{parts[0]:>7}{parts[1]:>7}{count / seconds:>9.1f}   {share}")


def other_python(python: str, root: Path, out: Path) -> tuple[float, float]:
    """The MDS loop under another interpreter."""
    command = [python, "-W", "ignore", __file__, "--only-streaming", str(root), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return float(wall), float(cpu)


def streaming_version(python: str | None) -> str:
    """The version of the peer in the other environment."""
    if python is None:
        return "not measured, see --streaming-python"
    ask = (
        "import importlib.metadata as m; print(m.version('mosaicml-streaming'), 'with rasterio', m.version('rasterio'))"
    )
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def write_big(folder: Path) -> None:
    """A scene of 20,000 x 20,000 x 4 and its colours, a row of blocks at a time."""
    folder.mkdir(parents=True)
    town, ids = render(1, 0, 1024)
    wide = -(-BIG // 1024)
    bands = np.tile(np.concatenate([np.moveaxis(town, -1, 0), town[None, ..., 1]]), (1, 1, wide))[:, :, :BIG]
    colors = np.tile(np.moveaxis(PALETTE[ids], -1, 0), (1, 1, wide))[:, :, :BIG]
    for name, pixels in (("image", bands), ("label", colors)):
        profile = {"driver": "GTiff", "count": len(pixels), "height": BIG, "width": BIG, "dtype": "uint8"}
        options = KINDS["tiled deflate"] | {"predictor": 1, "zlevel": 1, "BIGTIFF": "YES", "alpha": "NO"}
        with rasterio.open(folder / f"big_{name}.tif", "w", **profile, **options) as target:
            for row in range(0, BIG, 1024):
                height = min(1024, BIG - row)
                noisy = pixels[:, :height] ^ (
                    np.random.default_rng(row).integers(0, 4, dtype=np.uint8, size=(height, BIG))
                    if name == "image"
                    else 0
                )
                target.write(noisy, window=Window(0, row, BIG, height))


def big(folder: Path, emit: Report) -> bool:
    """Peak memory of a process that packs the big scene."""
    write_big(folder / "big")
    command = [sys.executable, "-W", "ignore", __file__, "--only-big", str(folder / "big"), str(folder / "big-out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds, count = json.loads(done.stdout.splitlines()[-1])
    holds = bool(peak < LIMIT_BYTES)
    emit(f"\n{BIG} x {BIG} x 4 uint8 with its colours, tiled 256: {count} tiles in {seconds:.0f} s by one worker")
    emit(
        f"peak memory {peak / 2**20:.0f} MiB (limit {LIMIT_BYTES / 2**20:.0f}): {'holds' if holds else 'DOES NOT HOLD'}"
    )
    return holds


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Packing against its limit and against peers")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--size", type=int, default=3072, help="pixels of a scene")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--big", action="store_true", help="also the peak memory of a 20,000 x 20,000 x 4 scene")
    parser.add_argument("--streaming-python", help="an interpreter that has mosaicml-streaming and what shards needs")
    parser.add_argument("--out", type=Path, help="write what is printed into this file, too")
    parser.add_argument("--only-streaming", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only-big", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run it; 0 when the limits hold."""
    options = parse()
    if options.only_streaming:
        root, out = map(Path, options.only_streaming)
        streaming = importlib.import_module("streaming")
        print(json.dumps(timed(lambda: streaming_loop(streaming, sorted(root.glob("*_image.tif")), out))))
        return 0
    if options.only_big:
        wall, _ = timed(lambda: pack(recipe("rgbn"), *map(Path, options.only_big)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([peak, wall, (-(-BIG // TILE)) ** 2]))
        return 0
    emit = Report()
    emit(f"command: python {' '.join(sys.argv)}")
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} at the start"
    emit(f"date {time.strftime('%Y-%m-%d')}, {machine}")
    names = ("rasterio", "numpy", "webdataset")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    emit(f"Python {platform.python_version()}, GDAL {rasterio.__gdal_version__}, {versions}")
    emit(f"MosaicML Streaming: {streaming_version(options.streaming_python)}")
    with tempfile.TemporaryDirectory() as folder:
        holds = [compare(kind, Path(folder), options, emit) for kind in KINDS]
        if options.big:
            holds.append(big(Path(folder), emit))
    emit("\nthe limits hold" if all(holds) else "\nTHE LIMITS DO NOT HOLD")
    if options.out:
        options.out.write_text("\n".join(emit.lines) + "\n")
    return 0 if all(holds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
