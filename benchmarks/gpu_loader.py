"""Part `loader` of `benchmarks.gpu`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu_engine import Deadline, Engine, Report, Setting, synchronise
from dctc.data.ahead import CopyAhead
from dctc.engine.parallel import Parallel
from dctc.methods import Batch
from dctc.methods.base import IGNORE
from dctc.networks import NetworkSpec

if TYPE_CHECKING:
    from shards.manifest import Dataset

BANDS, CLASSES = 3, 6
NEEDED = ("pydantic", "webdataset", "rasterio", "kornia", "zlib_ng", "yaml")  # by reading and writing shards
WORKERS = (0, 2, 4, 8)
DeviceBatch = tuple[Tensor, Tensor, Tensor | None]
Source = Callable[[int], Iterator[list[DeviceBatch]]]


@dataclass(frozen=True)
class Sizes:
    """Of what is read and trained on."""

    width: int
    tile: int
    batch: int
    rounds: int


@dataclass(frozen=True)
class Pace:
    """Of a number of rounds: images a second, and the share of the time that the host waited for data."""

    images: float
    waited: float


def pace(source: Source, consume: Callable[[list[DeviceBatch]], object], sizes: Sizes, device: torch.device) -> Pace:
    """Time ``sizes.rounds`` rounds of both streams, after two to warm up."""
    batches = source(sizes.rounds + 2)
    for _ in range(2):
        consume(next(batches))
    synchronise(device)
    start, waited = time.perf_counter(), 0.0
    for _ in range(sizes.rounds):
        asked = time.perf_counter()
        found = next(batches)
        waited += time.perf_counter() - asked
        consume(found)
    synchronise(device)
    seconds = time.perf_counter() - start
    assert next(batches, None) is None, "a source yields as many rounds as it is asked for"
    return Pace(2 * sizes.batch * sizes.rounds / seconds, waited / seconds)


def trainer(sizes: Sizes, parallel: Parallel) -> Callable[[list[DeviceBatch]], object]:
    """Consumes a round by training dctc on it: bf16, channels_last, eager."""
    engine = Engine("dctc", NetworkSpec(BANDS, CLASSES, width=sizes.width), Setting("bf16", True), parallel)

    def consume(found: list[DeviceBatch]) -> object:
        labelled, (others, seen, *_) = found
        return engine.round(Batch(*labelled), Batch(others, seen), 0)

    return consume


def pinned(sizes: Sizes, device: torch.device, number: int = 8) -> list[list[Any]]:
    """Rounds of uint8 batches on the host, pinned where there is a GPU to copy to."""
    rounds = []
    for k in range(number):
        generator = torch.Generator().manual_seed(k)
        shape = (sizes.batch, BANDS, sizes.tile, sizes.tile)
        raws = []
        for _ in range(2):
            raw = {
                "images": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
                "labels": torch.randint(0, CLASSES, (sizes.batch, *shape[2:]), dtype=torch.uint8, generator=generator),
                "valid": torch.ones(sizes.batch, *shape[2:], dtype=torch.bool),
            }
            raws.append({key: t.pin_memory() if device.type == "cuda" else t for key, t in raw.items()})
        rounds.append(raws)
    return rounds


def copies(sizes: Sizes, parallel: Parallel, emit: Report) -> None:
    """Batches that lie ready on the host, copied when they are asked for or ahead."""
    device = parallel.device
    host = pinned(sizes, device)

    def prepare(raw: Any) -> DeviceBatch:
        images, valid, labels = (raw[key].to(device, non_blocking=True) for key in ("images", "valid", "labels"))
        return torch.where(valid[:, None], images.float() / 255, 0.0), valid, torch.where(valid, labels.long(), IGNORE)

    resident = [prepare(raw) for raw in host[0]]
    ahead = CopyAhead(prepare, device)
    sources: dict[str, Source] = {
        "resident": lambda rounds: iter([resident] * rounds),
        "copied when asked for": lambda rounds: ([prepare(raw) for raw in host[k % 8]] for k in range(rounds)),
        "copied ahead": lambda rounds: ahead(host[k % 8] for k in range(rounds)),
    }
    size = sum(t.numel() * t.element_size() for raw in host[0] for t in raw.values())
    emit(f"batches of uint8 on the host, {size / 1e6:.1f} MB a round, to normalised tensors; waited: share of the time")
    emit(f"{'source':28}{'alone: images/s':>18}{'training: images/s':>20}{'waited %':>10}")
    for name, source in sources.items():
        alone = "-" if name == "resident" else f"{pace(source, lambda _: None, sizes, device).images:.1f}"
        busy = pace(source, trainer(sizes, parallel), sizes, device)
        emit(f"{name:28}{alone:>18}{busy.images:20.1f}{100 * busy.waited:10.1f}")


def missing() -> list[str]:
    """Packages of the data path that are not installed here."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def packed_dataset(folder: Path, sizes: Sizes, quick: bool) -> Dataset:
    """Made towns, packed."""
    from benchmarks.sharding import recipe, write_scenes
    from shards.pack import pack

    write_scenes(folder / "scenes", "tiled deflate", 2, 4 * sizes.tile if quick else 8 * sizes.tile)
    settings = recipe("rgb").model_dump(exclude_unset=True)
    settings["tile"] = {"size": sizes.tile}
    return pack(type(recipe("rgb")).model_validate(settings), folder / "scenes", folder / "set", workers=2)


def packed(sizes: Sizes, quick: bool, parallel: Parallel, deadline: Deadline, emit: Report) -> None:
    """A packed dataset read by workers, alone and while training."""
    from dctc.data.loaders import TrainingStream
    from dctc.data.order import Layout
    from shards.index import Index

    with tempfile.TemporaryDirectory() as folder:
        dataset = packed_dataset(Path(folder), sizes, quick)
        rows = Index.open(dataset).rows("train")
        emit(f"\npacked dataset, {len(rows)} training tiles, augment flips, two streams with as many workers each")
        emit(f"{'workers':28}{'alone: images/s':>18}{'training: images/s':>20}{'waited %':>10}")
        for workers in (0, 1) if quick else [n for n in WORKERS if n <= (os.cpu_count() or 1)]:
            if deadline.left <= 0:
                emit(f"{workers:<28} left out: out of time")
                continue

            def source(rounds: int, workers: int = workers) -> Iterator[list[DeviceBatch]]:
                pair = [
                    TrainingStream(
                        dataset, k, rows, sizes.batch, 0, Layout(), "flips", workers, labels=k == 0, substitute=False
                    ).batches(range(rounds), parallel.device)
                    for k in (0, 1)
                ]
                return ([one[0], other[0]] for one, other in zip(*pair, strict=True))

            alone = pace(source, lambda _: None, sizes, parallel.device)
            busy = pace(source, trainer(sizes, parallel), sizes, parallel.device)
            emit(f"{workers:<28}{alone.images:18.1f}{busy.images:20.1f}{100 * busy.waited:10.1f}")


def run(options: argparse.Namespace, parallel: Parallel, deadline: Deadline, emit: Report) -> bool:
    """Copies to the device; then, where it can be, the whole way from shards."""
    quick = options.quick
    width, tile = options.width or (4 if quick else 64), options.tile or (32 if quick else 512)
    sizes = Sizes(width, tile, options.batch or (2 if quick else 4), 3 if quick else 40)
    batches = f"{sizes.batch}+{sizes.batch} tiles of {tile} px"
    emit(f"dctc, width {width}, bf16 channels_last, {batches}, {sizes.rounds} rounds")
    copies(sizes, parallel, emit)
    if absent := missing():
        emit(f"packed dataset: SKIPPED, not installed here: {', '.join(absent)}")
    else:
        packed(sizes, quick, parallel, deadline, emit)
    return True
