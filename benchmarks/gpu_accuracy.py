"""Part `accuracy` of `benchmarks.gpu`: the Dubai scenes, read by pillow as configs/data/dubai.yaml describes them."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu_engine import SEED, Deadline, Engine, Report, Setting
from dctc.data.order import LABELLED, UNLABELLED, GlobalOrder, Layout, RankBatchSampler
from dctc.engine.parallel import Parallel
from dctc.engine.schedule import Schedule
from dctc.methods import Batch, inference
from dctc.methods.base import IGNORE
from dctc.networks import NetworkSpec

RECIPE = Path(__file__).resolve().parents[1] / "configs/data/dubai.yaml"
SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))
SPLITS = ("test", "val", "train")  # a scene belongs to the first one whose patterns it matches
WARM_UP = 0.05  # share of the rounds
SEEDS = 20  # more than any time will allow
NAMES_OF_EVALUATION = ("val", "test")


@dataclass(frozen=True)
class Tiles:
    """Of one split, on the device: images uint8 [N,3,T,T], labels uint8 [N,T,T] with 255 = ignore, valid bool."""

    images: Tensor
    labels: Tensor
    valid: Tensor

    def batch(self, rows: list[int], mean: Tensor, std: Tensor, symmetries: list[int] | None = None) -> Batch:
        """Normalised tiles, each turned and mirrored as its symmetry (0 to 7) says."""
        chosen = torch.tensor(rows, device=self.images.device)
        images, labels, valid = self.images[chosen], self.labels[chosen], self.valid[chosen]
        if symmetries is not None:
            images, labels, valid = (_turned(tensor, symmetries) for tensor in (images, labels, valid))
        normal = torch.where(valid[:, None], (images.float() - mean) / std, 0.0)
        return Batch(normal, valid, labels.long())


def _turned(tensor: Tensor, symmetries: list[int]) -> Tensor:
    turned = (torch.rot90(one, k % 4, (-2, -1)) for one, k in zip(tensor, symmetries, strict=True))
    return torch.stack([one.flip(-1) if k >= 4 else one for one, k in zip(turned, symmetries, strict=True)])


def class_ids(colours: NDArray[np.uint8], recipe: Mapping[str, Any], path: Path) -> NDArray[np.uint8]:
    """Class ids of a mask [H,W,3], 255 where the recipe ignores a colour; every colour must be known."""
    packed = colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    ids = np.full(packed.shape, 254, np.uint8)
    named = [(k, one["color"]) for k, one in enumerate(recipe["classes"])]
    for number, (red, green, blue) in [*named, *((IGNORE, colour) for colour in recipe["label"]["ignore_colors"])]:
        ids[packed == (red << 16 | green << 8 | blue)] = number
    if (ids == 254).any():
        raise ValueError(f"{path}: holds a colour that {RECIPE.name} does not name")
    return ids


def scenes(folder: Path, recipe: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Split, image [H,W,3] and class ids [H,W] of each scene that belongs to a split."""
    from PIL import Image

    pattern, patterns = re.compile(recipe["image"]["pattern"]), recipe["splits"]["scene"]
    for path in sorted(folder.rglob("*.jpg")):
        found = pattern.fullmatch(path.relative_to(folder).as_posix())
        if found is None:
            continue
        name = recipe["scene_id"].format(**found.groupdict())
        split = next((s for s in SPLITS if any(fnmatchcase(name, one) for one in patterns[s])), None)
        mask = path.parents[1] / "masks" / f"{path.stem}.png"
        if split is not None:
            with Image.open(path) as image, Image.open(mask) as colours:
                ids = class_ids(np.asarray(colours.convert("RGB")), recipe, mask)
                yield split, np.asarray(image.convert("RGB")), ids


def cut(image: NDArray[np.uint8], ids: NDArray[np.uint8], size: int, least: float) -> Iterator[tuple[Any, Any, Any]]:
    """Image, labels and what is valid of each tile; the last row and column are padded, mere slivers left out."""
    height, width = ids.shape
    for top in range(0, height, size):
        for left in range(0, width, size):
            part, truth = image[top : top + size, left : left + size], ids[top : top + size, left : left + size]
            if truth.size < least * size * size:
                continue
            pixels, labels = np.zeros((3, size, size), np.uint8), np.full((size, size), IGNORE, np.uint8)
            valid = np.zeros((size, size), bool)
            pixels[:, : part.shape[0], : part.shape[1]] = np.moveaxis(part, -1, 0)
            labels[: part.shape[0], : part.shape[1]] = truth
            valid[: part.shape[0], : part.shape[1]] = True
            yield pixels, labels, valid


def load(folder: Path, recipe: Mapping[str, Any], size: int, device: torch.device) -> dict[str, Tiles]:
    """The tiles of each split."""
    found: dict[str, list[tuple[Any, Any, Any]]] = {split: [] for split in SPLITS}
    for split, image, ids in scenes(folder, recipe):
        found[split] += cut(image, ids, size, recipe["tile"]["min_valid_share"])
    if empty := [split for split, tiles in found.items() if not tiles]:
        raise ValueError(f"{folder}: no scenes for {', '.join(empty)}")
    columns = {split: [np.stack(column) for column in zip(*tiles, strict=True)] for split, tiles in found.items()}
    return {split: Tiles(*(torch.from_numpy(c).to(device) for c in triple)) for split, triple in columns.items()}


def miou(matrix: Tensor) -> float:
    """Mean intersection over union of the classes in truth or prediction, from counts [truth, prediction]."""
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean())


@dataclass
class Training:
    """One method at one share with one seed."""

    method: str
    share: Fraction
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}  share {self.share!s:5}{self.method:14}"


@dataclass
class Study:
    """Everything that the trainings have in common."""

    tiles: dict[str, Tiles]
    spec: NetworkSpec
    rounds: int
    batch: int
    parallel: Parallel

    def __post_init__(self) -> None:
        train = self.tiles["train"]
        pixels = [train.images[:, band][train.valid].double() for band in range(train.images.shape[1])]
        self.mean = torch.stack([p.mean() for p in pixels]).float()[:, None, None]
        self.std = torch.stack([p.std() for p in pixels]).float()[:, None, None]

    def score(self, one: Training) -> dict[str, dict[str, float]]:
        """Train; split -> net -> mIoU."""
        engine = Engine(one.method, self.spec, Setting("bf16", True), self.parallel, SEED + one.seed)
        schedule = Schedule(self.rounds, max(1, round(WARM_UP * self.rounds)), self.rounds)
        for step, (labelled, unlabelled) in enumerate(self._batches(one)):
            engine.updater.set_rate(schedule.factor(step))
            engine.round(labelled, unlabelled, step)
        return {split: self._evaluate(engine, self.tiles[split]) for split in NAMES_OF_EVALUATION}

    def _batches(self, one: Training) -> Iterator[tuple[Batch, Batch]]:
        """Both streams in the trainer's order; subsets are nested and the same for every method and seed."""
        train = self.tiles["train"]
        order = np.random.default_rng(0).permutation(len(train.images))
        many = math.ceil(one.share * len(order))
        subsets = {LABELLED: order[:many], UNLABELLED: order[many:]}
        draw = np.random.default_rng(one.seed)
        samplers = [
            RankBatchSampler(rows, GlobalOrder(len(rows), one.seed, k), self.batch, range(self.rounds), Layout())
            for k, rows in subsets.items()
        ]
        for pair in zip(*samplers, strict=True):
            labelled, unlabelled = (
                train.batch([row for _, row in chosen], self.mean, self.std, draw.integers(0, 8, len(chosen)).tolist())
                for chosen in pair
            )
            yield labelled, Batch(unlabelled.images, unlabelled.valid)

    def _evaluate(self, engine: Engine, tiles: Tiles) -> dict[str, float]:
        classes = self.spec.classes
        matrices: dict[str, Tensor] = defaultdict(lambda: torch.zeros(classes * classes, device=self.mean.device))
        with inference(*engine.method.parts.values()):
            for start in range(0, len(tiles.images), self.batch):
                rows = list(range(start, min(start + self.batch, len(tiles.images))))
                batch = tiles.batch(rows, self.mean, self.std)
                truth = batch.required_labels()
                for net, values in engine.logits(batch.images).items():
                    pairs = (truth * classes + values.argmax(1))[truth != IGNORE]
                    matrices[net] = matrices[net] + torch.bincount(pairs, minlength=classes * classes)
        return {net: miou(matrix.view(classes, classes)) for net, matrix in matrices.items()}


def trainings(methods: list[str], quick: bool) -> Iterator[Training]:
    """Seed by seed, so that what is done by the end is comparable."""
    for seed in range(1 if quick else SEEDS):
        for share in SHARES[-1:] if quick else SHARES:
            for method in methods:
                yield Training(method, share, seed)


def summary(found: Mapping[tuple[str, Fraction], list[dict[str, float]]], emit: Report) -> None:
    """Means over the seeds."""
    emit(f"\n{'method':14}{'share':8}{'seeds':>6}   test mIoU % of each net: mean (standard deviation) over the seeds")
    for (method, share), scores in found.items():
        cells = []
        for net in scores[0]:
            values = [100 * score[net] for score in scores]
            spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{net} {statistics.mean(values):.1f}{spread}")
        emit(f"{method:14}{share!s:8}{len(scores):6}   {', '.join(cells)}")


def run(options: argparse.Namespace, parallel: Parallel, deadline: Deadline, emit: Report) -> bool:
    """Trainings until the time is over."""
    width, name = options.width or (4 if options.quick else 64), options.networks[0]
    if not (options.data / "Tile 8").is_dir():
        emit(f'SKIPPED: {options.data} has no folder "Tile 8"; name the Dubai scenes by --data')
        return True
    import yaml

    recipe = yaml.safe_load(RECIPE.read_text())
    quick = options.quick
    tile = options.tile or (64 if quick else 256)
    tiles = load(options.data, recipe, tile, parallel.device)
    spec = NetworkSpec(3, len(recipe["classes"]), name=name, width=width)
    study = Study(tiles, spec, options.rounds or (2 if quick else 1500), options.batch or 8, parallel)
    counts = ", ".join(f"{split} {len(tiles[split].images)}" for split in reversed(SPLITS))
    emit(
        f"tiles of {tile} px: {counts}; whole scenes apart; {spec.name}, width {width}, {study.batch}+{study.batch} "
        f"tiles, {study.rounds} rounds, Adam 1e-3 with warm-up and cosine, flips and turns, bf16 channels_last"
    )
    found: dict[tuple[str, Fraction], list[dict[str, float]]] = defaultdict(list)
    longest: dict[str, float] = {}
    for one in trainings(options.methods, quick):
        if deadline.left < longest.get(one.method, 0) or deadline.left <= 0:
            emit(f"{one} and what would follow: left out, out of time")
            break
        start = time.monotonic()
        scores = study.score(one)
        longest[one.method] = time.monotonic() - start
        nets = ", ".join(
            f"{net} {100 * scores['test'][net]:.1f} (val {100 * scores['val'][net]:.1f})" for net in scores["test"]
        )
        emit(f"{one} {longest[one.method]:6.1f} s  test mIoU % {nets}")
        found[one.method, one.share].append(scores["test"])
    summary(found, emit)
    return True
