"""The part of `benchmarks.loading` that runs in a peer's own environment: MosaicML Streaming's or LitData's.

    VENV/bin/python -m benchmarks.loading_peers streaming DATASET FOLDER WORKERS

Writes the tiles of DATASET into FOLDER in the peer's format unless FOLDER is there, reads them, shuffled, and prints as
JSON: without workers the CPU milliseconds a tile, else tiles a second and the seconds until the first batch. Each
measurement is a process of its own, since MosaicML's dataset hangs when it was read without workers before.

Two environments, since MosaicML's pins clash with ours; for each: torch for the CPU, the peer, and

    pip install rasterio pydantic PyYAML pillow rich psutil webdataset zlib-ng

MosaicML Streaming 0.13 also needs `filelock==3.18.0` (later ones refuse locks that were forked) and, beside a torch for
the CPU, `pip install --no-deps torchvision==0.15.2` (later ones do not import without the operators of CUDA).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.loading import (
    BATCH,
    IMAGE,
    LABEL,
    WARM,
    HostBatch,
    Sample,
    count,
    cpu,
    decode_batch,
    members,
    on_device,
    pace,
)
from dctc.data.loaders import PREFETCH
from dctc.data.tiles import TileDataset
from shards.manifest import Dataset


def write_peer(name: str, samples: Iterable[Sample], folder: Path) -> None:
    """The tiles in a peer's own format."""
    if name == "streaming":
        streaming = importlib.import_module("streaming")
        with streaming.MDSWriter(out=str(folder), columns={IMAGE: "bytes", LABEL: "bytes"}) as writer:
            for sample in samples:
                writer.write(sample)
        return
    folder.mkdir()
    writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(samples):
        writer[number] = sample
    writer.done()
    writer.merge()


def peer_batches(name: str, folder: Path, workers: int) -> Iterable[HostBatch]:
    """An epoch by a peer's loader, shuffled."""
    module = importlib.import_module(name)
    make: Any
    if name == "streaming":
        stream, make = module.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH), DataLoader
    else:
        stream, make = module.StreamingDataset(str(folder), shuffle=True), module.StreamingDataLoader
    ahead = {"prefetch_factor": PREFETCH} if workers else {}
    batches: Iterable[HostBatch] = make(
        stream, batch_size=BATCH, num_workers=workers, collate_fn=decode_batch, drop_last=True, **ahead
    )
    return batches


def run(name: str, place: Path, out: Path, workers: int) -> object:
    """Write what is not there yet, and read."""
    dataset = Dataset.open(place)
    tiles = TileDataset(dataset, labels=True)
    if not out.exists():
        write_peer(name, members(tiles, range(len(tiles))), out)
    rounds = len(tiles) // BATCH
    batches = peer_batches(name, out, workers)
    if workers:
        return pace(on_device(batches, dataset), rounds - WARM)
    return cpu(lambda: count(batches), rounds * BATCH)


if __name__ == "__main__":
    print("\n" + json.dumps(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
