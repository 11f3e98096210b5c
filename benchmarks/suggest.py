"""Is it worth labelling what `dctc suggest` suggests? Test mIoU against the same number of random tiles.

    python benchmarks/suggest.py --out benchmarks/results/suggest.txt

Many small synthetic towns, split by town. For every seed: a supervised U-Net learns from a few random training tiles,
`dctc suggest` names more, `dctc shard` takes the list back, and two networks are trained from scratch: on the start and
the suggested tiles, and on the start and as many random ones (the next of the dataset's nested order). Everything runs
through the commands that users type. A seed decides which towns train and test, the nested order, the weights and the
order of tiles; both sides share it. Exit code 0 when the suggested tiles win by a paired t-test over the seeds, one
sided at 5 %; 1 otherwise.

Cars and clutter, a few percent of the pixels, become "not labelled" (`--without`): networks of this size and length
find such a class or miss it by luck, and each time that moves the mIoU by some points, more than labels do.
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
import yaml
from numpy.typing import NDArray
from scipy import stats

from shards.index import Index
from shards.manifest import Dataset

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "configs/data/synthetic.yaml"
SIGNIFICANT = 0.05


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


def shard(folder: Path, seed: int, options: argparse.Namespace, *overrides: str) -> Path:
    """Pack the towns; more of them test than by default, so that the score says more."""
    dctc("shard", RECIPE, folder, "--root", options.scenes, "--workers", 1,
         f"splits.seed={seed}", "splits.scene.test_share=0.4", f"labelled.seed={seed}",
         f"tile.size={options.tile}", *without(options.without), *overrides)  # fmt: skip
    return folder


def without(names: Sequence[str]) -> list[str]:
    """Recipe overrides that leave classes out: their pixels are not labelled."""
    classes = yaml.safe_load((ROOT / RECIPE).read_text())["classes"]
    kept = [info for info in classes if info["name"] not in names]
    colors = [info["color"] for info in classes if info["name"] in names]
    return [f"classes={json.dumps(kept)}", f"label.ignore_colors={json.dumps(colors)}"]


def trained(folder: Path, dataset: Path, share: Fraction, seed: int, options: argparse.Namespace) -> Path:
    """A model file after training from scratch on a labelled share."""
    dctc("train", "configs/synthetic/unet.yaml", f"data.dataset={dataset}", f"data.labelled_share={share}",
         f"data.batch_labelled={options.batch}", f"optimizer.lr={options.lr}", f"network.width={options.width}",
         f"schedule.rounds={options.rounds}", f"run.seed={seed}",
         f"run.output={folder}", "run.experiment=suggest", "run.name=run", "run.pictures_every=0",
         f"run.checkpoint_every={options.rounds}", "evaluation.every=0", "evaluation.test=false",
         "tracking.enabled=false")  # fmt: skip
    return folder / "suggest" / "run" / "model.safetensors"


def scored(model: Path, dataset: Path) -> dict[str, float]:
    """mIoU and IoU by class on the test tiles, in %."""
    record: dict[str, Any] = json.loads(dctc("evaluate", model, dataset, "--json", "--device", "cpu"))
    (net,) = record["nets"].values()
    ious = {name: 100 * (values["iou"] or 0.0) for name, values in net["scores"]["classes"].items()}
    return {"miou": 100 * net["scores"]["miou"], **ious}


def class_shares(index: Index, rows: NDArray[np.int64], classes: int) -> list[float]:
    """Share of ``rows`` that show each class, in %: what the two ways of choosing differ in."""
    masks = index.classes[rows]
    return [100 * float((masks >> k & 1).mean()) for k in range(classes)]


def try_seed(seed: int, work: Path, options: argparse.Namespace, say: Any) -> Trial:
    """Start, random and suggested for one seed."""
    base = shard(work / "base", seed, options)
    total = Dataset.open(base).manifest.labelled.total
    start, more = Fraction(options.start, total), Fraction(options.start + options.budget, total)
    model = trained(work / "start", base, start, seed, options)
    record = json.loads(dctc("suggest", base, model, "--budget", options.budget, "--labelled-share", start,
                             "--out", work / "tiles.gpkg", "--json"))  # fmt: skip
    again = shard(work / "again", seed, options, *record["shard_overrides"])
    if Fraction(record["labelled_share"]) != more:
        raise SystemExit(f"the share is {record['labelled_share']}, not {more}")
    for name, dataset in (("random", base), ("suggested", again)):
        index = Index.open(Dataset.open(dataset))
        rows = index.labelled_rows(more)
        towns = len(np.unique(index.scene[rows]))
        shares = class_shares(index, rows[options.start :], len(Dataset.open(dataset).manifest.class_names))
        cells = " ".join(f"{share:5.1f}" for share in shares)
        say(f"  seed {seed}: {name:>9} tiles with each class, in %: {cells}; labels from {towns} towns in all")
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
    keys = list(trials[0].start)
    say(f"{'':>12}" + "".join(f"{key[:13]:>14}" for key in keys))
    for name in ("start", "random", "suggested"):
        rows = [getattr(trial, name) for trial in trials]
        cells = []
        for key in keys:
            values = [row[key] for row in rows]
            cells.append(f"{statistics.mean(values):6.1f} +-{statistics.stdev(values):5.1f}")
        say(f"{name:>12} " + "".join(f"{cell:>14}" for cell in cells))
    suggested, random = ([getattr(trial, name)["miou"] for trial in trials] for name in ("suggested", "random"))
    gains = [one - other for one, other in zip(suggested, random, strict=True)]
    say("suggested - random, mIoU by seed: " + " ".join(f"{gain:+.1f}" for gain in gains))
    test = stats.ttest_rel(suggested, random, alternative="greater")
    error = statistics.stdev(gains) / len(gains) ** 0.5
    say(f"mean {statistics.mean(gains):+.1f}, standard deviation {statistics.stdev(gains):.1f}, standard error "
        f"{error:.1f}, better in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds")  # fmt: skip
    say(f"paired t-test, one sided: t = {test.statistic:.2f}, p = {test.pvalue:.3f}")
    worth_it = bool(test.pvalue < SIGNIFICANT)
    say("the suggested tiles win" if worth_it else "NOT SHOWN that the suggested tiles win")
    return worth_it


def main() -> int:
    """Run all seeds; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("towns", 80), ("size", 128), ("tile", 32), ("start", 12), ("budget", 24), ("width", 8),
                        ("batch", 8), ("rounds", 500), ("seeds", 5)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--without", nargs="*", default=["car", "clutter"], help="classes left out")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    options = parser.parse_args()
    if options.seeds < 3:
        parser.error("--seeds: fewer than 3 show nothing")
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    began = time.perf_counter()
    say(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} CPU cores of which one is used, "
        f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    say(f"{options.towns} towns of {options.size} px, tiles of {options.tile} px, {options.start} labelled at the "
        f"start, {options.budget} more; U-Net of width {options.width}, {options.rounds} rounds of {options.batch} "
        f"tiles, learning rate {options.lr}; classes left out: {' '.join(options.without) or 'none'}")  # fmt: skip
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
