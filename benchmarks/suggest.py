"""Is it worth labelling what `dctc suggest` suggests? Test mIoU against the same number of random tiles.

    python benchmarks/suggest.py --out benchmarks/results/suggest.txt

Synthetic towns, split by scene. For every seed: a supervised U-Net learns from a few random training tiles, `dctc
suggest` names as many again and more, `dctc shard` takes the list back, and two networks are trained from scratch: on
the start and the suggested tiles, and on the start and as many random ones (the next of the dataset's nested order).
Everything runs through the commands that users type. A seed decides towns' nested order, weights and the order of
tiles; both sides share it. Exit code 1 when the suggested tiles do not win on average.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.index import Index
from shards.manifest import Dataset

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("impervious_surface", "building", "low_vegetation", "tree", "car", "clutter")


@dataclass(frozen=True)
class Trial:
    """Test scores of one seed in %: of the start, with random, with suggested tiles; mIoU and IoU by class."""

    start: dict[str, float]
    random: dict[str, float]
    suggested: dict[str, float]


def dctc(*words: object) -> str:
    """Run a command; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dctc.cli", *map(str, words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"dctc {' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def shard(folder: Path, scenes: Path, options: argparse.Namespace, *overrides: str) -> Path:
    """Pack the towns."""
    dctc("shard", "configs/data/synthetic.yaml", folder, "--root", scenes, "--workers", 1,
         f"tile.size={options.tile}", *overrides)  # fmt: skip
    return folder


def trained(folder: Path, dataset: Path, share: Fraction, seed: int, options: argparse.Namespace) -> Path:
    """A model file after training from scratch on a labelled share."""
    dctc("train", "configs/synthetic/unet.yaml", f"data.dataset={dataset}", f"data.labelled_share={share}",
         f"network.width={options.width}", f"schedule.rounds={options.rounds}", f"run.seed={seed}",
         f"run.output={folder}", "run.experiment=suggest", "run.name=run", "run.pictures_every=0",
         f"run.checkpoint_every={options.rounds}", "evaluation.every=0", "evaluation.test=false",
         "tracking.enabled=false")  # fmt: skip
    return folder / "suggest" / "run" / "model.safetensors"


def scored(model: Path, dataset: Path) -> dict[str, float]:
    """mIoU and IoU by class on the test tiles, in %."""
    record: dict[str, Any] = json.loads(dctc("evaluate", model, dataset, "--json", "--device", "cpu"))
    (net,) = record["nets"].values()
    ious = {name: 100 * (net["scores"]["classes"][name]["iou"] or 0.0) for name in CLASSES}
    return {"miou": 100 * net["scores"]["miou"], **ious}


def class_shares(dataset: Path, rows: Sequence[int]) -> list[float]:
    """Share of ``rows`` that show each class, in %: what the two ways of choosing differ in."""
    index = Index.open(Dataset.open(dataset))
    masks = index.classes[np.array(rows)]
    return [100 * float((masks >> k & 1).mean()) for k in range(len(CLASSES))]


def try_seed(seed: int, work: Path, options: argparse.Namespace, say: Any) -> Trial:
    """Start, random and suggested for one seed."""
    base = shard(work / "base", options.scenes, options, f"labelled.seed={seed}")
    total = Dataset.open(base).manifest.labelled.total
    start, more = Fraction(options.start, total), Fraction(options.start + options.budget, total)
    model = trained(work / "start", base, start, seed, options)
    record = json.loads(dctc("suggest", base, model, "--budget", options.budget, "--labelled-share", start,
                             "--out", work / "tiles.gpkg", "--json"))  # fmt: skip
    again = shard(work / "again", options.scenes, options, *record["shard_overrides"])
    if Fraction(record["labelled_share"]) != more:
        raise SystemExit(f"the share is {record['labelled_share']}, not {more}")
    for name, dataset in (("random", base), ("suggested", again)):
        rows = Index.open(Dataset.open(dataset)).labelled_rows(more)[options.start :].tolist()
        cells = " ".join(f"{share:5.1f}" for share in class_shares(dataset, rows))
        say(f"  seed {seed}: tiles with each class, in % of the {options.budget} {name:>9}: {cells}")
    trial = Trial(
        scored(model, base),
        scored(trained(work / "random", base, more, seed, options), base),
        scored(trained(work / "suggested", again, more, seed, options), again),
    )
    for name in ("start", "random", "suggested"):
        say(f"  seed {seed}: {name:>9} " + " ".join(f"{value:6.1f}" for value in getattr(trial, name).values()))
    return trial


def summary(trials: Sequence[Trial], say: Any) -> bool:
    """Mean and standard deviation over seeds; whether the suggested tiles win."""
    say("")
    say(f"{'':>12} {'mIoU':>13}" + "".join(f"{name[:13]:>14}" for name in CLASSES))
    for name in ("start", "random", "suggested"):
        rows = [getattr(trial, name) for trial in trials]
        cells = []
        for key in ("miou", *CLASSES):
            values = [row[key] for row in rows]
            cells.append(f"{statistics.mean(values):6.1f} +-{statistics.stdev(values):5.1f}")
        say(f"{name:>12} " + "".join(f"{cell:>14}" for cell in cells))
    gains = [trial.suggested["miou"] - trial.random["miou"] for trial in trials]
    won = sum(gain > 0 for gain in gains)
    say(f"suggested - random: {statistics.mean(gains):+.1f} +- {statistics.stdev(gains):.1f} mIoU, "
        f"better in {won} of {len(gains)} seeds")  # fmt: skip
    return statistics.mean(gains) > 0


def main() -> int:
    """Run all seeds; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("towns", 15), ("size", 512), ("tile", 64), ("start", 24), ("budget", 24), ("width", 8),
                        ("rounds", 300), ("seeds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: a standard deviation needs two")
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    began = time.perf_counter()
    say(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} CPU cores of which one is used, "
        f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    say(f"{options.towns} towns of {options.size} px, tiles of {options.tile} px, {options.start} labelled at the "
        f"start, {options.budget} more; U-Net of width {options.width}, {options.rounds} rounds")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        options.scenes = Path(folder) / "scenes"
        dctc("synth", options.scenes, "--scenes", options.towns, "--size", options.size)
        trials = [try_seed(seed, Path(folder) / str(seed), options, say) for seed in range(options.seeds)]
    worth_it = summary(trials, say)
    say(f"{time.perf_counter() - began:.0f} s")
    if options.out is not None:
        options.out.write_text("\n".join([*lines, ""]))
    return 0 if worth_it else 1


if __name__ == "__main__":
    sys.exit(main())
