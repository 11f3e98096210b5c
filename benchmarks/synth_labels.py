"""Do labels matter on synthetic towns? Test mIoU of a small U-Net against the share of labelled tiles.

    python benchmarks/synth_labels.py --out benchmarks/results/synth_labels.txt

For every share the network, the number of steps, the test scenes and the random numbers are the same; only the number
of labelled training tiles differs. Train and test scenes are disjoint, so no light, season or building stock of a test
scene has been seen. The shares of a seed are nested prefixes of one permutation of the training tiles. Limit to hold:
all labels at least 5 mIoU above 1/8 of them; the exit code is 1 when it does not.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dctc.networks.unet import UNet
from shards.manifest import parse_share, share_count
from shards.synth import render

CLASSES = ("impervious", "building", "low veg.", "tree", "car", "clutter")
MINIMUM_GAP = 5.0


@dataclass(frozen=True)
class Tiles:
    """Images uint8 [N,3,T,T] and labels int64 [N,T,T]."""

    images: Tensor
    labels: Tensor


def cut(scenes: range, size: int, tile: int, seed: int) -> Tiles:
    """Render scenes and cut them into tiles that do not overlap."""
    images, labels = [], []
    for scene in scenes:
        picture, ids = render(seed, scene, size)
        for row in range(0, size - tile + 1, tile):
            for col in range(0, size - tile + 1, tile):
                images.append(picture[row : row + tile, col : col + tile])
                labels.append(ids[row : row + tile, col : col + tile])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Tiles(pixels, torch.from_numpy(np.stack(labels)).long())


def train(tiles: Tiles, normalise: tuple[Tensor, Tensor], seed: int, options: argparse.Namespace) -> UNet:
    """Adam, cosine with warm-up, cross-entropy; tiles are drawn with replacement, no augmentation."""
    torch.manual_seed(seed)
    rng = np.random.Generator(np.random.Philox(seed))
    net = UNet(bands=3, classes=len(CLASSES), width=options.width)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps, pct_start=0.05)
    net.train()
    for _ in range(options.steps):
        rows = torch.from_numpy(rng.integers(0, len(tiles.labels), options.batch))
        loss = F.cross_entropy(forward(net, tiles.images[rows], normalise), tiles.labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
        schedule.step()
    return net


def forward(net: UNet, images: Tensor, normalise: tuple[Tensor, Tensor]) -> Tensor:
    """Float32 logits [B,6,T,T] of uint8 images."""
    mean, std = normalise
    pixels = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = net(pixels)
    return logits.float()


def intersection_over_union(net: UNet, tiles: Tiles, normalise: tuple[Tensor, Tensor]) -> npt.NDArray[np.float64]:
    """IoU of each class in percent from one confusion matrix over all test pixels."""
    net.eval()
    matrix = torch.zeros(len(CLASSES) ** 2, dtype=torch.int64)
    with torch.inference_mode():
        for images, labels in zip(torch.split(tiles.images, 32), torch.split(tiles.labels, 32), strict=True):
            predicted = forward(net, images, normalise).argmax(1)
            matrix += torch.bincount((labels * len(CLASSES) + predicted).flatten(), minlength=len(CLASSES) ** 2)
    counts = matrix.reshape(len(CLASSES), -1).double().numpy()
    right = np.diag(counts)
    iou: npt.NDArray[np.float64] = 100.0 * right / (counts.sum(0) + counts.sum(1) - right)
    return iou


def table(options: argparse.Namespace, emit: Report) -> bool:
    """Train and test every share and seed, print the table, and say whether the limits hold."""
    all_scenes = options.train_scenes + options.test_scenes
    known = cut(range(options.train_scenes), options.size, options.tile, options.data_seed)
    test = cut(range(options.train_scenes, all_scenes), options.size, options.tile, options.data_seed)
    pixels = known.images.float()
    normalise = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    emit(f"{len(known.labels)} training tiles of {options.tile} px, {len(test.labels)} test tiles\n")
    emit(f"{'share':>6} {'tiles':>5}  {'mIoU over seeds':<16}{'mean':>6} {'std':>5}   " + "  ".join(CLASSES))
    means = {}
    for share in map(parse_share, options.shares):
        count = share_count(share, len(known.labels))
        scores = []
        for seed in options.seeds:
            order = np.random.Generator(np.random.Philox([seed, 1])).permutation(len(known.labels))
            rows = torch.from_numpy(order[:count])
            net = train(Tiles(known.images[rows], known.labels[rows]), normalise, seed, options)
            scores.append(intersection_over_union(net, test, normalise))
        runs = np.mean(scores, axis=1)
        means[share] = float(runs.mean())
        single = " ".join(f"{run:.1f}" for run in runs)
        classes = "  ".join(f"{v:>{len(n)}.1f}" for n, v in zip(CLASSES, np.mean(scores, axis=0), strict=True))
        emit(f"{share!s:>6} {count:>5}  {single:<16}{runs.mean():>6.1f} {runs.std():>5.1f}   {classes}")
    gap = means[max(means)] - means[min(means)]
    holds = gap >= MINIMUM_GAP
    emit(f"\ngap between {max(means)} and {min(means)} of the labels: {gap:.1f} mIoU (limit {MINIMUM_GAP:.0f})")
    emit("the limits hold" if holds else "THE LIMITS DO NOT HOLD")
    return holds


class Report:
    """Prints lines as they come and keeps them for the result file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Test mIoU of a small U-Net against the share of labelled tiles")
    parser.add_argument("--shares", nargs="+", default=["1/8", "1/4", "1/2", "1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train-scenes", type=int, default=24)
    parser.add_argument("--test-scenes", type=int, default=12)
    parser.add_argument("--size", type=int, default=256, help="pixels of a scene")
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write what is printed into this file, too")
    return parser.parse_args()


def main() -> int:
    """Run it; 0 when the limits hold."""
    options = parse()
    torch.set_num_threads(options.threads)
    emit = Report()
    emit(f"command: python {' '.join(sys.argv)}")
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {options.threads} threads"
    emit(f"date {time.strftime('%Y-%m-%d')}, {machine}")
    emit(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    emit(
        f"U-Net width {options.width}, {options.steps} steps of {options.batch} tiles, Adam 1e-3 with cosine, bf16; "
        f"scenes of {options.size} px, data seed {options.data_seed}: {options.train_scenes} train, "
        f"{options.test_scenes} test; seeds {options.seeds}"
    )
    start = time.perf_counter()
    holds = table(options, emit)
    runs = len(options.shares) * len(options.seeds)
    emit(f"{(time.perf_counter() - start) / runs:.0f} s a run, rendering and testing included")
    if options.out:
        options.out.write_text("\n".join(emit.lines) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
