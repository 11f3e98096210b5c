"""The confusion matrix against numbers worked by hand, scikit-learn, and its own invariants."""

from __future__ import annotations

import csv
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics

from dctc.evaluation.confusion import Agreement, ConfusionMatrix, EntropyMeter, Scores, entropy
from shards.errors import InputError

NAMES = ("road", "tree", "clutter")
#            predicted: road tree clutter
HAND = [[50, 10, 0], [5, 20, 5], [0, 0, 10]]  # 60 + 30 + 10 = 100 pixels


def counted(matrix: list[list[int]]) -> ConfusionMatrix:
    """A matrix filled through update(), pixel by pixel."""
    pairs = [(t, p) for t, row in enumerate(matrix) for p, n in enumerate(row) for _ in range(n)]
    truth, prediction = torch.tensor(pairs).T
    confusion = ConfusionMatrix(len(matrix))
    confusion.update(prediction, truth)
    assert confusion.matrix.tolist() == matrix
    return confusion


def close(value: float, exact: Fraction) -> bool:
    return math.isclose(value, float(exact), rel_tol=1e-14)


def test_hand_worked_three_classes() -> None:
    scores = counted(HAND).scores(NAMES)
    # column sums (predicted): 55, 30, 15; row sums (truth): 60, 30, 10; unions: 60+55-50=65, 30+30-20=40, 10+15-10=15
    iou = [Fraction(50, 65), Fraction(20, 40), Fraction(10, 15)]
    recall = [Fraction(50, 60), Fraction(20, 30), Fraction(10, 10)]
    precision = [Fraction(50, 55), Fraction(20, 30), Fraction(10, 15)]
    f1 = [Fraction(100, 115), Fraction(40, 60), Fraction(20, 25)]
    chance = Fraction(60 * 55 + 30 * 30 + 10 * 15, 100 * 100)  # 0.435
    assert close(scores.pa, Fraction(80, 100))
    assert close(scores.mpa, sum(recall, Fraction(0)) / 3)  # 5/6
    for got, exact in ((scores.iou, iou), (scores.recall, recall), (scores.precision, precision), (scores.f1, f1)):
        assert all(close(float(g), e) for g, e in zip(got, exact, strict=True))
    metrics = scores.as_metrics("val/s1")
    assert close(metrics["val/s1/miou"], sum(iou, Fraction(0)) / 3)
    assert close(metrics["val/s1/precision"], sum(precision, Fraction(0)) / 3)
    assert close(metrics["val/s1/recall"], Fraction(5, 6))
    assert close(metrics["val/s1/f1"], sum(f1, Fraction(0)) / 3)
    assert close(scores.fwiou, Fraction(60, 100) * iou[0] + Fraction(30, 100) * iou[1] + Fraction(10, 100) * iou[2])
    assert close(scores.kappa, (Fraction(80, 100) - chance) / (1 - chance))
    assert close(scores.miou_without(["clutter"]), (iou[0] + iou[1]) / 2)
    without = scores.as_metrics("x", without=["clutter"])
    for kind, values in (("miou", iou), ("mpa", recall), ("precision", precision), ("f1", f1)):
        assert close(without[f"x/{kind}_without_clutter"], (values[0] + values[1]) / 2)
        assert scores.as_record(["clutter"])[f"{kind}_without_clutter"] == without[f"x/{kind}_without_clutter"]


def test_metric_names_are_the_documented_ones() -> None:
    metrics = counted(HAND).scores(NAMES).as_metrics("test/s1", without=["clutter"])
    means = {"miou", "pa", "mpa", "f1", "precision", "recall", "fwiou", "kappa"}
    means |= {f"{kind}_without_clutter" for kind in ("miou", "mpa", "precision", "f1")}
    assert set(metrics) == {f"test/s1/{m}" for m in means} | {f"test/s1/iou/{n}" for n in NAMES}
    assert all(type(value) is float for value in metrics.values())


def test_perfect_prediction_scores_one_everywhere() -> None:
    scores = counted([[7, 0, 0], [0, 3, 0], [0, 0, 1]]).scores(NAMES)
    assert set(scores.as_metrics("x").values()) == {1.0}


def test_single_class_everywhere_is_perfect_agreement() -> None:
    assert counted([[9, 0], [0, 0]]).scores(("a", "b")).kappa == 1.0


def test_absent_class_is_left_out_of_means_and_null_in_the_record() -> None:
    scores = counted([[4, 1, 0], [2, 3, 0], [0, 0, 0]]).scores(NAMES)
    assert math.isnan(scores.iou[2])
    assert math.isclose(scores.miou, (4 / 7 + 3 / 6) / 2)
    metrics = scores.as_metrics("x")
    assert "x/iou/clutter" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    record = json.loads(json.dumps(scores.as_record(), allow_nan=False))
    assert record["classes"]["clutter"]["iou"] is None
    assert record["classes"]["road"]["pixels"] == 5


def test_class_only_predicted_counts_as_zero() -> None:
    scores = counted([[4, 0, 1], [0, 5, 0], [0, 0, 0]]).scores(NAMES)
    assert scores.iou[2] == 0.0
    assert scores.recall[2] == 0.0
    assert math.isclose(scores.miou, (4 / 5 + 1 + 0) / 3)


def test_miou_without_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"clutered.*road, tree, clutter"):
        counted(HAND).scores(NAMES).miou_without(["clutered"])


def test_a_set_of_clutter_alone_has_scores_and_none_without_it() -> None:
    scores = counted([[0, 0, 0], [0, 0, 0], [0, 0, 5]]).scores(NAMES)
    assert scores.means_without(["clutter"]) == {}
    metrics = scores.as_metrics("x", without=["clutter"])
    assert metrics["x/miou"] == 1.0
    assert not [key for key in metrics if "without" in key]


def test_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth, noise = random.integers(0, 5, (2, 64, 64)), random.integers(0, 5, (2, 64, 64))
    prediction = np.where(random.random((2, 64, 64)) < 0.6, truth, noise)
    confusion = ConfusionMatrix(5)
    confusion.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    scores = confusion.scores("abcde")
    t, p = truth.ravel(), prediction.ravel()
    assert (scores.matrix == metrics.confusion_matrix(t, p)).all()
    for name, reference in (("iou", metrics.jaccard_score), ("f1", metrics.f1_score)):
        np.testing.assert_allclose(getattr(scores, name), reference(t, p, average=None), rtol=1e-12)
    for name, reference in (("precision", metrics.precision_score), ("recall", metrics.recall_score)):
        np.testing.assert_allclose(getattr(scores, name), reference(t, p, average=None), rtol=1e-12)
    assert math.isclose(scores.pa, metrics.accuracy_score(t, p))
    assert math.isclose(scores.mpa, metrics.balanced_accuracy_score(t, p))
    assert math.isclose(scores.kappa, metrics.cohen_kappa_score(t, p))
    assert math.isclose(scores.fwiou, metrics.jaccard_score(t, p, average="weighted"))


@settings(max_examples=40, deadline=None)
@given(
    truth=hnp.arrays(np.uint8, (2, 5, 5), elements=st.sampled_from([0, 1, 2, 255])),
    garbage=hnp.arrays(np.int64, (2, 5, 5), elements=st.integers(-300, 300)),
    valid=hnp.arrays(np.bool_, (2, 5, 5)),
)
def test_pixels_left_out_have_no_influence(truth: np.ndarray, garbage: np.ndarray, valid: np.ndarray) -> None:
    out = (truth == 255) | ~valid
    prediction = np.where(out, garbage, (truth + 1) % 3)
    labels = np.where(~valid, garbage, truth)  # under nodata even the label may be anything
    whole, kept = ConfusionMatrix(3), ConfusionMatrix(3)
    whole.update(torch.from_numpy(prediction), torch.from_numpy(labels), torch.from_numpy(valid))
    kept.update(torch.from_numpy(prediction[~out]), torch.from_numpy(truth[~out]))
    assert torch.equal(whole.matrix, kept.matrix)
    assert whole.counts[-1] == 0


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=4))
def test_any_partition_and_reduction_gives_the_same_matrix(cuts: list[int]) -> None:
    random = torch.Generator().manual_seed(1)
    truth, prediction = torch.randint(0, 4, (2, 200), generator=random)
    whole = ConfusionMatrix(4)
    whole.update(prediction, truth)
    edges = [0, *sorted(cuts), 200]
    parts = [ConfusionMatrix(4) for _ in edges[1:]]
    for part, a, b in zip(parts, edges[:-1], edges[1:], strict=True):
        part.update(prediction[a:b], truth[a:b])
    total = torch.stack([part.counts for part in parts]).sum(0)
    parts[0].reduce(lambda counts: total)
    parts[-1].reduce(lambda counts: counts.copy_(total))
    assert torch.equal(parts[0].matrix, whole.matrix)
    assert torch.equal(parts[-1].matrix, whole.matrix)


def test_accumulators_never_read_the_device() -> None:
    """Tensors on the meta device have no values: any read-back (bincount, item, nonzero) raises."""
    ids = torch.zeros(2, 8, 8, dtype=torch.int64, device="meta")
    valid, logits = ids.bool(), torch.zeros(2, 3, 8, 8, device="meta")
    ConfusionMatrix(3, device="meta").update(ids, ids, valid)
    EntropyMeter(device="meta").update(logits, valid)
    Agreement(device="meta").update(ids, ids, valid)


def test_impossible_class_id_is_named() -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 1, 2]), torch.tensor([0, 7, 2]))
    with pytest.raises(InputError, match=r"1 pixels .* 0\.\.2"):
        confusion.scores(NAMES)


def test_nothing_to_score_is_an_error() -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 1]), torch.tensor([255, 255]))
    with pytest.raises(InputError, match="no labelled pixel"):
        confusion.scores(NAMES)


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ConfusionMatrix(3).update(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


def test_csv_files(tmp_path: Path) -> None:
    scores = counted([[4, 1, 0], [2, 3, 0], [0, 0, 0]]).scores(NAMES)
    scores.write_csv(tmp_path / "classes.csv", ["clutter"])
    scores.write_matrix_csv(tmp_path / "matrix.csv")
    table = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["class"] for row in table] == [*NAMES, "mean", "mean without clutter"]
    assert float(table[0]["iou"]) == 4 / 7
    assert table[2]["iou"] == ""
    assert float(table[3]["iou"]) == float(table[4]["iou"]) == scores.miou, "clutter is absent here"
    matrix = list(csv.reader((tmp_path / "matrix.csv").open()))
    assert matrix[1:] == [["road", "4", "1", "0"], ["tree", "2", "3", "0"], ["clutter", "0", "0", "0"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classes.csv", "matrix.csv"]


def test_scores_are_frozen() -> None:
    scores = counted(HAND).scores(NAMES)
    with pytest.raises(ValueError, match="read-only"):
        scores.matrix[0, 0] = 1
    assert isinstance(scores, Scores)


def numpy_entropy(logits: np.ndarray, temperature: float) -> np.ndarray:
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.asarray(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_meter_against_float64(temperature: float) -> None:
    logits = torch.randn(3, 6, 16, 16, generator=torch.Generator().manual_seed(0)) * 4
    valid = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.3
    meter = EntropyMeter(temperature)
    meter.update(logits[:1], valid[:1])
    meter.update(logits[1:], valid[1:])
    exact = numpy_entropy(logits.numpy(), temperature)[valid.numpy()].mean()
    assert math.isclose(meter.value(), exact, rel_tol=1e-6)


def test_entropy_extremes() -> None:
    uniform, certain = torch.zeros(1, 5, 2, 2), torch.zeros(1, 5, 2, 2)
    certain[:, 0] = 1e4
    masked = torch.tensor([0.0, 0.0, -math.inf]).view(1, 3, 1, 1)
    assert math.isclose(entropy(uniform).mean().item(), math.log(5), rel_tol=1e-6)
    assert entropy(certain).abs().max().item() == 0.0
    assert math.isclose(entropy(masked).item(), math.log(2), rel_tol=1e-6)
    assert entropy(uniform.bfloat16()).dtype == torch.float32


def test_meters_ignore_nan_under_nodata_and_are_nan_when_empty() -> None:
    logits = torch.zeros(1, 2, 1, 2)
    logits[..., 1] = math.nan
    meter = EntropyMeter()
    assert math.isnan(meter.value())
    meter.update(logits, torch.tensor([[[True, False]]]))
    assert math.isclose(meter.value(), math.log(2), rel_tol=1e-6)


def test_agreement() -> None:
    first, second = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 1, 1, 0]])
    meter = Agreement()
    assert math.isnan(meter.value())
    meter.update(first, second, torch.tensor([[True, True, True, False]]))
    assert meter.value() == 2 / 3
    meter.reduce(lambda totals: totals * 2)
    assert meter.totals.tolist() == [4, 6]
