"""One evaluation of every net: exact on any number of ranks, against scikit-learn and numpy on real tiles."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics
from torch import Tensor

from dctc.data.loaders import DeviceBatch, Normaliser, evaluation_batches
from dctc.data.order import Layout
from dctc.data.tiles import RawBatch
from dctc.evaluation.evaluate import Evaluation, Reduce, evaluate_tiles
from dctc.evaluation.pictures import look_at
from dctc.evaluation.report import write_evaluation
from shards.index import Index
from shards.manifest import Dataset

CPU = torch.device("cpu")
TILES = 7  # a prime number: no layout divides it
NETS = ("s1", "s2", "ema")
NAMES = ["road", "tree", "clutter"]


def mixtures(images: Tensor) -> dict[str, Tensor]:
    """Nets of fixed linear mixtures of the bands: what they say of a pixel depends on that pixel alone."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: 2 * torch.randn(6, images.shape[1], generator=generator) for name in NETS}
    return {name: (w[..., None, None] * images[:, None]).sum(2) for name, w in weights.items()}


def noted(into: list[Tensor], tensor: Tensor) -> Tensor:
    """The tensor itself, of which a copy is kept."""
    into.append(tensor.clone())
    return tensor


def on_ranks(world: int, evaluate: Callable[[Layout, Reduce], Evaluation]) -> Evaluation:
    """What rank 0 of ``world`` gets: each rank is asked once for its own counts, then once more with the sums."""
    told: list[list[Tensor]] = []
    for rank in range(world):
        own: list[Tensor] = []
        evaluate(Layout(world, rank), partial(noted, own))
        told.append(own)
    assert len({len(own) for own in told}) == 1, "a rank that makes another call would hang the others"
    sums = iter([torch.stack(tensors).sum(0) for tensors in zip(*told, strict=True)])
    return evaluate(Layout(world, 0), lambda _: next(sums))


def record(evaluation: Evaluation) -> dict[str, Any]:
    """Without what is measured in seconds and bytes."""
    found: dict[str, Any] = json.loads(json.dumps(evaluation.as_record(), allow_nan=False))
    return {key: value for key, value in found.items() if key in ("nets", "agreement", "tiles")}


@pytest.fixture(scope="module")
def evaluations(tiny_dataset: Path) -> tuple[Dataset, NDArray[np.int64], dict[int, Evaluation]]:
    """Dataset, rows, and their evaluation by number of ranks."""
    dataset = Dataset.open(tiny_dataset)
    rows = Index.open(dataset).rows("train")[:TILES]

    def evaluate(layout: Layout, reduce: Reduce) -> Evaluation:
        batches = evaluation_batches(dataset, rows, 2, layout, Normaliser.of(dataset.manifest, CPU))
        return evaluate_tiles(mixtures, batches, dataset.manifest.class_names, CPU, reduce)

    return dataset, rows, {world: on_ranks(world, evaluate) for world in (1, 2, 3, 5)}


@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_prime_number_of_tiles_scores_the_same_on_any_number_of_ranks(
    evaluations: tuple[Dataset, NDArray[np.int64], dict[int, Evaluation]], world: int
) -> None:
    found, alone = record(evaluations[2][world]), record(evaluations[2][1])
    assert found["tiles"] == TILES
    for name in NETS:
        for key in ("entropy", "sharpened_entropy"):  # sums of floats, in another order
            assert found["nets"][name].pop(key) == pytest.approx(alone["nets"][name][key], rel=1e-12)
            assert alone["nets"][name][key] > 0
        for key in found["nets"][name]:
            assert found["nets"][name][key] == alone["nets"][name][key], key
    assert found["agreement"] == alone["agreement"]
    assert 0 < alone["agreement"] < 1


def test_scores_of_real_tiles_are_those_of_scikit_learn(
    evaluations: tuple[Dataset, NDArray[np.int64], dict[int, Evaluation]],
) -> None:
    """All pixels of all tiles in one array, in one batch, without ranks; padding would show."""
    dataset, rows, by_world = evaluations
    batches = evaluation_batches(dataset, rows, TILES, Layout(), Normaliser.of(dataset.manifest, CPU))
    ((images, valid, labels), _), *none = list(batches)
    assert not none
    assert labels is not None
    counted = ((labels != 255) & valid).numpy()
    truth, kept = labels.numpy()[counted], list(range(6))
    for name, z in mixtures(images).items():
        said = z.argmax(1).numpy()[counted]
        net = by_world[3].nets[name]
        assert net.scores is not None
        assert (net.scores.matrix == metrics.confusion_matrix(truth, said, labels=kept)).all()
        present = np.isin(kept, truth) | np.isin(kept, said)
        expected = metrics.jaccard_score(truth, said, labels=np.flatnonzero(present), average="macro", zero_division=0)
        assert net.scores.miou == pytest.approx(expected, rel=1e-12)
        shares = np.bincount(z.argmax(1)[valid].numpy(), minlength=6) / int(valid.sum())
        np.testing.assert_allclose(net.predicted, shares, rtol=1e-12)
        probabilities = torch.softmax(z.double(), 1).amax(1).numpy()[counted]
        bins = np.minimum((probabilities * 15).astype(int), 14)
        gaps = np.bincount(bins, (said == truth) - probabilities, 15)
        assert net.reliability.ece == pytest.approx(np.abs(gaps).sum() / len(truth), abs=1e-5)


def test_the_files_of_an_evaluation(
    evaluations: tuple[Dataset, NDArray[np.int64], dict[int, Evaluation]], tmp_path: Path
) -> None:
    evaluation = evaluations[2][1]
    files = write_evaluation(tmp_path, evaluation, "val")
    assert sorted(files) == sorted(tmp_path.iterdir())
    kinds = ("", "-confusion", "-calibration", "-calibration-sharpened")
    expected = {f"val-{net}{kind}.csv" for net in NETS for kind in kinds} | {"val-classes.csv", "val-classes-ece.csv"}
    expected |= {f"val-{net}{kind}.png" for net in NETS for kind in ("-confusion", "-calibration")}
    assert {file.name for file in files} == expected
    table = [line.split(",") for line in (tmp_path / "val-classes-ece.csv").read_text().splitlines()]
    assert table[0] == ["class", *NETS]
    assert table[-1] == ["all pixels", *(repr(evaluation.nets[net].reliability.ece) for net in NETS)]
    by_class = evaluation.nets["ema"].reliability.ece_by_class
    assert {row[0]: float(row[3]) for row in table[1:-1] if row[3]} == by_class
    means = [line for line in (tmp_path / "val-s1.csv").read_text().splitlines() if line.startswith("mean")]
    assert [line.split(",")[0] for line in means] == ["mean", "mean without clutter"]


# ---- made batches


def batch(labels: Tensor, valid: Tensor) -> tuple[DeviceBatch, RawBatch]:
    """Tiles of one band whose values are their places."""
    images = torch.arange(labels.numel(), dtype=torch.float32).view(len(labels), 1, *labels.shape[1:])
    raw = RawBatch(
        images=images, valid=valid, labels=labels.to(torch.uint8), positions=torch.zeros(len(labels)),
        rows=torch.arange(len(labels)), damaged=torch.full((len(labels),), -1),
    )  # fmt: skip
    return (images, valid, labels), raw


def evaluated(logits: Callable[[Tensor], dict[str, Tensor]], labels: Tensor, valid: Tensor) -> Evaluation:
    return evaluate_tiles(logits, [batch(labels, valid)], NAMES, CPU, lambda tensor: tensor)


def table(values: Tensor, nets: Sequence[str] = ("s1",)) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda _: dict.fromkeys(nets, values)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), other=st.integers(0, 10**6))
def test_ignored_pixels_have_no_influence_on_any_score(seed: int, other: int) -> None:
    """Whatever a net says of them, and under nodata also whatever the label is."""
    random, noise = (torch.Generator().manual_seed(number) for number in (seed, other))
    labels = torch.randint(0, 3, (2, 4, 5), generator=random)
    labels[torch.rand(labels.shape, generator=random) < 0.3] = 255
    labels[0, 0, 0] = 0  # one is counted
    valid = torch.rand(labels.shape, generator=random) > 0.2
    valid[0, 0, 0] = True
    logits = torch.randn(2, 3, 4, 5, generator=random)
    unlabelled, nodata = (valid & (labels == 255))[:, None], ~valid[:, None]
    changed = torch.where(unlabelled | nodata, 9 * torch.randn(logits.shape, generator=noise), logits)
    first, second = evaluated(table(logits), labels, valid), evaluated(table(changed), labels, valid)
    one, two = first.nets["s1"], second.nets["s1"]
    assert one.scores is not None
    assert two.scores is not None
    assert one.scores.as_record(["clutter"]) == two.scores.as_record(["clutter"])
    for a, b in ((one.reliability, two.reliability), (one.sharpened_reliability, two.sharpened_reliability)):
        assert a.rows() == b.rows()
        assert a.ece_by_class == b.ece_by_class
    hidden = evaluated(table(torch.where(nodata, changed, logits)), labels, valid)
    whole = evaluated(table(logits), labels, valid)
    assert record(hidden) == record(whole), "nodata counts nowhere at all"


def test_nets_keep_the_names_of_the_method_and_agreement_is_of_two_students() -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for nets, agreement in ((("s1", "ema"), None), (("ema", "s2"), None), (("s1", "s2", "mean"), 1.0)):
        evaluation = evaluated(table(logits, nets), labels, everywhere)
        assert tuple(evaluation.nets) == nets
        assert evaluation.agreement == agreement
        assert {key.split("/")[1] for key in evaluation.as_metrics("val")} - {"agreement"} == set(nets)


def test_pictures_show_the_nets_of_any_method() -> None:
    """The known ones in their order, then others; not the mean, which looks like the two."""
    labels = torch.tensor([[[0, 1], [2, 255]]])
    logits = torch.nn.functional.one_hot(labels.clamp(max=2), 3).permute(0, 3, 1, 2).float()
    nets = {"zeta": logits, "mean": logits, "s1": -logits, "ema": 2 * logits}
    columns, valid = look_at(lambda _: nets, [batch(labels, torch.ones_like(labels, dtype=torch.bool))], "ema")
    assert list(columns) == ["image", "label", "ema", "S1", "zeta", "entropy"]
    assert columns["ema"].tolist() == [[[0, 1], [2, 2]]]
    sure = np.exp(2) / (np.exp(2) + 2)
    nats = -(sure * np.log(sure) + 2 / (np.exp(2) + 2) * np.log(1 / (np.exp(2) + 2)))
    np.testing.assert_allclose(np.asarray(columns["entropy"], np.float64), nats, rtol=1e-5)  # of the headline
    assert valid.all()


def test_tiles_without_a_label_have_entropy_and_no_scores(tmp_path: Path) -> None:
    labels = torch.full((1, 2, 2), 255)
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    evaluation = evaluated(table(torch.zeros(1, 3, 2, 2)), labels, everywhere)
    assert evaluation.as_metrics("val") == pytest.approx(
        {"val/s1/entropy": np.log(3), "val/s1/sharpened_entropy": np.log(3)}
    )
    net = record(evaluation)["nets"]["s1"]
    assert (net["scores"], net["ece"], net["sharpened_ece"], net["ece_by_class"]) == (None, None, None, {})
    assert evaluation.nets["s1"].pseudo_metrics("x") == {}
    assert write_evaluation(tmp_path, evaluation, "val") == []
    nothing = evaluated(table(torch.zeros(1, 3, 2, 2)), labels, ~everywhere)
    assert record(nothing)["nets"]["s1"]["entropy"] is None


def test_a_clutter_class_without_pixels_of_another_is_no_error() -> None:
    labels = torch.full((1, 2, 2), 2)
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 2] = 5
    evaluation = evaluated(table(logits), labels, torch.ones_like(labels, dtype=torch.bool))
    assert evaluation.as_metrics("val")["val/s1/miou"] == 1.0
    assert evaluation.nets["s1"].pseudo_metrics("x")["x/miou"] == 1.0
