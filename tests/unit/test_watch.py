"""What is looked at beside the training: the quality of pseudo labels against held labels, dying classes by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import metrics
from torch import Tensor

from dctc.config import load_config
from dctc.data.loaders import DeviceBatch, evaluation_batches
from dctc.data.tiles import RawBatch, TileDataset
from dctc.engine.build import locate, prepare, resolve, settle
from dctc.engine.parallel import Parallel
from dctc.engine.preempt import StopRequest
from dctc.engine.trainer import Tracker, Trainer
from dctc.engine.watch import DYING_BELOW, DYING_FROM
from shards.manifest import Dataset
from tests.tiny import write_config

Nets = Callable[[Tensor], dict[str, Tensor]]


@dataclass
class Watched:
    """A run whose nets are replaced: what its watch measures and says."""

    trainer: Trainer
    said: list[str]

    def look(self, nets: Nets, rounds: int) -> dict[str, float]:
        """The metrics of a validation after so many rounds."""
        self.trainer.method.logits = nets  # type: ignore[method-assign, assignment]  # stands in for trained nets
        self.trainer.progress.rounds = rounds
        return self.trainer.watch.validate(self.trainer.progress)

    def pixels(self, rows: str) -> tuple[Tensor, NDArray[np.bool_], NDArray[np.uint8]]:
        """Normalised images [N,C,H,W], where they have data, and labels [N,H,W] of some watched rows, by hand."""
        dataset = self.trainer.watch.dataset
        raw = [TileDataset(dataset, labels=True)[0, int(row)] for row in self.trainer.watch.rows[rows]]
        images, valid, labels = (torch.cat([tile[key] for tile in raw]) for key in ("images", "valid", "labels"))
        mean, std = (
            torch.tensor([getattr(band, key) for band in dataset.manifest.bands])[:, None, None]
            for key in ("mean", "std")
        )
        return (images.float() - mean) / std, valid.numpy(), labels.numpy()

    def shares(self) -> dict[str, float]:
        """Of each class in the labels in use."""
        _, valid, labels = self.pixels("labelled")
        counted = labels[valid & (labels != 255)]
        names = self.trainer.watch.dataset.manifest.class_names
        return {name: float((counted == number).mean()) for number, name in enumerate(names)}


@pytest.fixture
def watched(tiny_dataset: Path, tmp_path: Path) -> Watched:
    """A run of 100 rounds; a class may be called dying from round 20 on."""
    path = write_config(tmp_path / "run.yaml", tiny_dataset, schedule={"rounds": 100}, network={"width": 2})
    config = settle(resolve(load_config(path)), torch.device("cpu"))
    dataset, parallel = Dataset.open(tiny_dataset), Parallel()
    run = locate(config, dataset, parallel)
    run.folder.mkdir(parents=True)
    stop = cast(StopRequest, SimpleNamespace(received=None))
    trainer = prepare(config, dataset, parallel, run, stop)(cast(Tracker, SimpleNamespace()))
    said: list[str] = []
    trainer.watch.warn = said.append
    return Watched(trainer, said)


def only(*classes: int) -> Callable[[Tensor], Tensor]:
    """A net that predicts these classes alone, in stripes of equal shares."""

    def logits(images: Tensor) -> Tensor:
        stripe = torch.arange(images.shape[-1]) % len(classes)
        chosen = torch.tensor(classes)[stripe].expand(len(images), *images.shape[-2:])
        return 3 * torch.nn.functional.one_hot(chosen, 6).permute(0, 3, 1, 2).float()

    return logits


def test_a_dying_class_is_named_once_and_once_more_when_it_is_back(watched: Watched) -> None:
    all_classes, one = only(*range(6)), only(0)

    def nets(s1: Callable[[Tensor], Tensor]) -> Nets:
        return lambda images: {"s1": s1(images), "teacher": all_classes(images), "mean": s1(images)}

    shares = watched.shares()
    dead = {name for number, (name, share) in enumerate(shares.items()) if number and share >= DYING_FROM}
    assert len(dead) >= 3, "the towns have enough of several classes"

    early = watched.look(nets(one), rounds=19)
    assert watched.said == []
    assert early["train/dying/s1"] == len(dead), "it is measured from the first round on"

    found = watched.look(nets(one), rounds=20)
    assert (found["train/dying/s1"], found["train/dying/mean"], found["train/dying/teacher"]) == (len(dead),) * 2 + (0,)
    assert {line.split("'")[1] for line in watched.said} == dead
    for line in watched.said:
        name = line.split("'")[1]
        assert (
            line == f"class {name!r} is dying in s1: 0.00% of the unlabelled pixels, {shares[name]:.2%} of the labels"
        )

    watched.look(nets(one), rounds=21)
    assert len(watched.said) == len(dead), "once"
    watch = watched.trainer.watch
    report = json.loads(watch.report(watched.trainer.progress, None, False, 4, {}).read_text())["unlabelled"]
    assert {name: set(net["dying"]) for name, net in report.items()} == {"s1": dead, "mean": dead, "teacher": set()}
    quality = {
        key.removeprefix("train/pseudo/s1/"): v for key, v in found.items() if key.startswith("train/pseudo/s1/")
    }
    assert report["s1"]["pseudo_labels"] == pytest.approx(quality)
    assert "miou" in quality

    found = watched.look(nets(all_classes), rounds=22)
    assert found["train/dying/s1"] == 0
    assert {line.split("'")[1] for line in watched.said[len(dead) :]} == dead
    assert all("is back in s1" in line for line in watched.said[len(dead) :])

    watched.look(nets(one), rounds=23)
    assert len(watched.said) == 3 * len(dead), "and again when it dies again"


def test_the_report_tells_of_pseudo_labels_without_a_validation_of_this_process(watched: Watched) -> None:
    """As of a run that was killed between its last checkpoint and its report."""
    watch = watched.trainer.watch
    watch._unlabelled.clear()
    report = json.loads(watch.report(watched.trainer.progress, None, False, 4, {}).read_text())["unlabelled"]
    expected = watched.look(watch.method.logits, rounds=1)
    assert set(report) == {"s1", "s2", "mean", "teacher"}
    for name, found in report.items():
        assert found["pseudo_labels"]["miou"] == pytest.approx(expected[f"train/pseudo/{name}/miou"])


def test_a_class_dies_below_a_tenth_of_its_share(watched: Watched) -> None:
    """The largest class, seen in a little more or a little less of the pixels than that."""
    name, share = max(watched.shares().items(), key=lambda item: item[1])
    number = list(watched.shares()).index(name)
    size = watched.trainer.watch.dataset.manifest.tile_size

    def seen_in(pixels: int) -> Nets:
        def logits(images: Tensor) -> dict[str, Tensor]:
            place = torch.arange(size * size).view(size, size).expand(len(images), size, size)
            said = torch.where(place < pixels, number, (number + 1) % 6)
            return {"s1": torch.nn.functional.one_hot(said, 6).permute(0, 3, 1, 2).float()}

        return logits

    _, valid, _ = watched.pixels("probe")
    assert valid.all(), "each pixel counts"
    limit = DYING_BELOW * share * size * size
    watched.look(seen_in(int(limit) + 1), rounds=50)
    assert not [line for line in watched.said if f"{name!r}" in line]
    watched.look(seen_in(int(limit)), rounds=51)
    assert len([line for line in watched.said if f"class {name!r} is dying in s1" in line]) == 1


def test_pseudo_labels_are_scored_against_the_labels_that_are_held_back(watched: Watched) -> None:
    """Net by net and class by class, as scikit-learn does on the same tiles."""
    weights = 2 * torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))

    def nets(images: Tensor) -> dict[str, Tensor]:
        return {
            name: (w[..., None, None] * images[:, None]).sum(2) for name, w in zip(("ema", "s2"), weights, strict=True)
        }

    watched.trainer.watch.rows["val"] = watched.trainer.watch.rows["val"][:0]
    found = watched.look(nets, rounds=50)
    images, valid, labels = watched.pixels("probe")
    held = set(watched.trainer.watch.rows["probe"].tolist())
    assert not held & set(watched.trainer.watch.rows["labelled"].tolist()), "labels that training never sees"
    counted, names = valid & (labels != 255), watched.trainer.watch.dataset.manifest.class_names
    truth, everything = labels[counted], list(range(6))
    for name, z in nets(images).items():
        said = z.argmax(1).numpy()[counted]
        scores = {
            "iou": metrics.jaccard_score(truth, said, labels=everything, average=None, zero_division=0),
            "precision": metrics.precision_score(truth, said, labels=everything, average=None, zero_division=0),
            "recall": metrics.recall_score(truth, said, labels=everything, average=None, zero_division=0),
        }
        present = [number for number in everything if number in truth or number in said]
        confidence = torch.softmax(z.double(), 1).amax(1).numpy()[counted]
        for kind, values in scores.items():
            expected = {names[number]: values[number] for number in present}
            prefix = f"train/pseudo/{name}/{kind}/"
            got = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
            assert got == pytest.approx(expected, rel=1e-12)
        assert found[f"train/pseudo/{name}/miou"] == pytest.approx(np.mean(scores["iou"][present]), rel=1e-12)
        kept = [number for number in present if names[number] != "clutter"]
        assert found[f"train/pseudo/{name}/miou_without_clutter"] == pytest.approx(np.mean(scores["iou"][kept]))
        assert found[f"train/pseudo/{name}/pa"] == pytest.approx((truth == said).mean(), rel=1e-12)
        for number in {*said.tolist()}:
            of = said == number
            gaps = np.bincount((confidence[of] * 15).astype(int), (truth[of] == number) - confidence[of])
            ece = found[f"train/pseudo/{name}/ece/{names[number]}"]
            assert ece == pytest.approx(np.abs(gaps).sum() / of.sum(), abs=1e-4)
        gaps = np.bincount((confidence * 15).astype(int), (truth == said) - confidence)
        assert found[f"train/pseudo/{name}/ece"] == pytest.approx(np.abs(gaps).sum() / len(truth), abs=1e-5)
        sharp = torch.softmax(2 * z.double(), 1).amax(1).numpy()[counted]
        gaps = np.bincount(np.minimum(sharp * 15, 14).astype(int), (truth == said) - sharp)
        assert found[f"train/pseudo/{name}/sharpened_ece"] == pytest.approx(np.abs(gaps).sum() / len(truth), abs=1e-5)


def test_tiles_without_data_say_nothing_of_a_class(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_data(*arguments: Any, **settings: Any) -> Iterator[tuple[DeviceBatch, RawBatch]]:
        for (images, valid, labels), raw in evaluation_batches(*arguments, **settings):
            yield (images, torch.zeros_like(valid), torch.full_like(cast(Tensor, labels), 255)), raw

    monkeypatch.setattr("dctc.engine.watch.evaluation_batches", without_data)
    watched.trainer.watch.rows["val"] = watched.trainer.watch.rows["val"][:0]
    found = watched.look(lambda images: {"s1": only(0)(images)}, rounds=50)
    assert found["train/dying/s1"] == 0
    assert watched.said == []
    assert not [key for key in found if key.startswith(("train/pseudo", "train/entropy"))]
