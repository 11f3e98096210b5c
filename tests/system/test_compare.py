"""Tables made from the runs of a real MLflow store."""

from __future__ import annotations

import csv
import math
import shutil
import socket
import statistics
from pathlib import Path

import pytest
from mlflow.entities import Dataset, DatasetInput
from mlflow.tracking import MlflowClient

from dctc.tracking.compare import compare, compare_classes, side_by_side
from dctc.tracking.run import resolve_uri
from dctc.tracking.tables import write_csv
from shards.errors import InputError
from tests.stored import Store, printed

PROFILE = '{"classes": ["road", "tree", "car"]}'


def test_mean_and_spread_over_seeds_best_in_bold(store: Store) -> None:
    for seed, score in enumerate((0.70, 0.72, 0.77)):
        store.add("dctc", "1/2", seed, s1=score, mean=score + 0.01, teacher=0.6)
    store.add("supervised", "0.5", 0, s1=0.65)
    store.add("supervised", "1/8", 0, s1=0.5)
    store.add("supervised", "1", 0, s1=0.801)
    (table,) = compare(store.uri, store.name)
    assert table.columns == ["1/8", "1/2", "1"]
    assert table.rows == [("dctc", "s1"), ("dctc", "mean"), ("dctc", "teacher"), ("supervised", "s1")]
    assert table.headlines == {"dctc": "s1", "supervised": "s1"}
    cell = table.cells["dctc", "s1", "1/2"]
    assert math.isclose(cell.mean, 0.73)
    assert cell.std is not None
    assert math.isclose(cell.std, statistics.stdev((0.70, 0.72, 0.77)))
    text = printed(table)
    assert "73.0 ± 3.6 (3)" in text
    assert "80.1 (1)" in text
    bold = printed(table, styled=True)
    assert "\x1b[1m73.0 ± 3.6 (3)" in bold, "the best headline"
    assert "\x1b[1m74.0" not in bold, "the mean of both students does not compete: it would be picked by its test score"
    assert table.notes == ()


def test_datasets_of_different_digest_are_never_averaged(store: Store) -> None:
    store.add("dctc", "1/2", 0, digest="aaa", s1=0.9)
    store.add("dctc", "1/2", 1, digest="bbb", s1=0.1)
    tables = compare(store.uri, store.name)
    assert [(table.digest, table.cells["dctc", "s1", "1/2"].scores) for table in tables] == [
        ("aaa", (0.9,)),
        ("bbb", (0.1,)),
    ]


def test_only_finished_and_tested_runs_count_and_a_seed_once(store: Store) -> None:
    store.add("dctc", "1/2", 0, s1=0.1)
    store.add("dctc", "1/2", 0, s1=0.5)
    store.add("dctc", "1/2", 1, status="FAILED", s1=0.2)
    store.add("dctc", "1/2", 2)
    (table,) = compare(store.uri, store.name)
    assert table.cells["dctc", "s1", "1/2"].scores == (0.5,)
    assert table.notes[0] == "dctc, 1/2: 1 earlier run(s) of the same seed left out"
    assert table.notes[1].startswith("1 run(s) failed: ")
    assert table.notes[2].startswith("1 run(s) finished without a test miou: ")
    assert len(table.notes) == 3


def test_runs_of_different_settings_are_rows_of_their_own(store: Store) -> None:
    for seed, width in enumerate(("16", "32")):
        params = {"network.width": width, "run.seed": str(seed), "optimizer.lr": "0.001"}
        store.add("dctc", "1/2", seed, params=params, s1=0.5 + seed / 10)
        store.add("unet", "1/2", 0, params=params, s1=0.5)
    store.add("dctc", "1/4", 0, params={"network.width": "16"}, s1=0.3)
    (table,) = compare(store.uri, store.name)
    assert {key: cell.scores for key, cell in table.cells.items()} == {
        ("dctc [network.width=16]", "s1", "1/2"): (0.5,),
        ("dctc [network.width=32]", "s1", "1/2"): (0.6,),
        ("dctc [network.width=16]", "s1", "1/4"): (0.3,),
        ("unet [network.width=16]", "s1", "1/2"): (0.5,),
        ("unet [network.width=32]", "s1", "1/2"): (0.5,),
    }
    assert table.notes == (
        "dctc: its runs differ in network.width, so it has several rows",
        "unet: its runs differ in network.width, so it has several rows",
    )


def test_options_that_are_newer_than_a_run_are_at_their_defaults(store: Store) -> None:
    """Else a seed of an earlier version would be a row of its own, or be averaged with what it is not."""
    now = {"method.name": "dctc", "method.label_turns": "1", "method.sharpen": "both"}
    store.add("dctc", "1/2", 0, params={"method.name": "dctc", "method.sharpen": "both"}, s1=0.4)
    store.add("dctc", "1/2", 1, params=now, s1=0.6)
    (table,) = compare(store.uri, store.name)
    assert table.cells["dctc", "s1", "1/2"].scores == (0.4, 0.6)
    store.add("dctc", "1/2", 2, params=now | {"method.label_turns": "4"}, s1=0.8)
    (table,) = compare(store.uri, store.name)
    assert {row for row, _ in table.rows} == {f"dctc [method.label_turns={turns}]" for turns in (1, 4)}
    assert table.cells["dctc [method.label_turns=1]", "s1", "1/2"].scores == (0.4, 0.6)


def test_shares_may_differ_between_columns_and_rows_in_their_settings(store: Store) -> None:
    store.add("dctc", "1/2", 0, params={"data.labelled_share": "1/2", "method.sharpen": "both"}, s1=0.5)
    store.add("dctc", "1/4", 0, params={"data.labelled_share": "1/4", "method.sharpen": "both"}, s1=0.4)
    store.add("cps", "1/4", 0, params={"data.labelled_share": "1/4", "method.weight": "1"}, s1=0.4)
    (table,) = compare(store.uri, store.name)
    assert {row for row, _ in table.rows} == {"dctc", "cps"}


def test_other_axes_and_nets(store: Store) -> None:
    store.add("dctc", "1/2", 0, s1=0.5, s2=0.6)
    store.add("dctc", "1/2", 1, s1=0.7)
    (table,) = compare(store.uri, store.name, rows="share", cols="seed", nets=("s2", "s1"))
    assert table.cells["1/2", "s2", "0"].scores == (0.6,)
    assert table.cells["1/2", "s1", "1"].scores == (0.7,)
    assert "–" in printed(table)


def test_what_a_continued_run_changed_is_what_it_ran_with(store: Store) -> None:
    params = {"schedule.rounds": "600"}
    store.add("dctc", "1/2", 0, params=params, s1=0.5)
    store.add("dctc", "1/2", 1, params=params, tags={"changed/schedule.rounds": "900"}, s1=0.7)
    (table,) = compare(store.uri, store.name)
    assert {row for row, _ in table.rows} == {"dctc [schedule.rounds=600]", "dctc [schedule.rounds=900]"}


def test_settings_that_rows_do_not_share_are_told_and_layouts_are_not(store: Store) -> None:
    own = {"data.labelled_share": "1/2", "run.seed": "0", "evaluation.batch": "8", "parallel.compile": "none"}
    store.add("dctc", "1/2", 0, params=own | {"schedule.rounds": "600", "method.name": "dctc"}, s1=0.5)
    other = own | {"data.labelled_share": "1/4", "parallel.compile": "default", "evaluation.batch": "4"}
    store.add("cps", "1/4", 0, params=other | {"schedule.rounds": "900", "method.name": "cps"}, s1=0.5)
    (table,) = compare(store.uri, store.name)
    assert table.notes == ("not all runs have the same schedule.rounds: 600 (dctc); 900 (cps)",)


def test_a_row_of_methods_with_different_headlines_has_each_ones_own(store: Store) -> None:
    store.add("mean_teacher", "1/2", 0, tags={"headline": "ema"}, s1=0.9, ema=0.4)
    store.add("supervised", "1/2", 0, s1=0.5)
    (table,) = compare(store.uri, store.name, rows="share", cols="method")
    assert table.rows[0] == ("1/2", "headline")
    assert table.cells["1/2", "headline", "mean_teacher"].scores == (0.4,)
    assert table.cells["1/2", "headline", "supervised"].scores == (0.5,)


def test_a_score_that_is_not_finite_is_none(store: Store) -> None:
    store.add("dctc", "1/2", 0, s1=math.nan)
    store.add("dctc", "1/2", 1, s1=0.5)
    (table,) = compare(store.uri, store.name)
    assert table.cells["dctc", "s1", "1/2"].scores == (0.5,)
    assert len(table.notes) == 1
    assert table.notes[0].startswith("1 run(s) finished without a test miou: ")


def test_runs_that_ended_before_they_had_a_dataset_are_told(store: Store) -> None:
    store.add("dctc", "1/2", 0, s1=0.5)
    store.add("cps", "1/2", 0, digest="other", status="FAILED")
    (table,) = compare(store.uri, store.name)
    assert table.notes[0].startswith("1 run(s) failed: ")


def test_csv_is_unrounded(store: Store, tmp_path: Path) -> None:
    store.add("dctc", "1/2", 0, s1=1 / 3)
    store.add("dctc", "1/2", 1, metrics={"perf/train_seconds": [2.5]}, s1=2 / 3)
    write_csv(compare(store.uri, store.name), tmp_path / "table.csv")
    (line,) = csv.DictReader((tmp_path / "table.csv").open())
    assert (line["row"], line["net"], line["column"], line["seeds"]) == ("dctc", "s1", "1/2", "2")
    assert float(line["mean"]) == statistics.fmean((1 / 3, 2 / 3))
    assert float(line["std"]) == statistics.stdev((1 / 3, 2 / 3))
    assert (line["headline"], line["train_seconds"], line["round_gflop"]) == ("1", "2.5", "")


def test_unknown_and_empty_experiments_are_named(store: Store) -> None:
    with pytest.raises(InputError, match="no finished run with a test miou"):
        compare(store.uri, store.name)
    with pytest.raises(InputError, match=f"no experiment 'potsdm'.*{store.name}"):
        compare(store.uri, "potsdm")
    store.add("dctc", "1/2", 0, metrics={"test/s1/pa": [0.5]}, s1=0.5)
    with pytest.raises(InputError, match="no finished run with a test iuo; its finished runs have miou, pa"):
        compare(store.uri, store.name, metric="iuo")
    for axes in ({"rows": "netwrk"}, {"cols": "netwrk"}):
        with pytest.raises(InputError, match=r"no run has a tag 'netwrk'.*; there are dataset_digest, labelled_share"):
            compare(store.uri, store.name, **axes)


def test_a_server_that_is_away_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with pytest.raises(InputError, match="cannot be read"):
            compare(f"http://127.0.0.1:{free.getsockname()[1]}", "any")


def test_the_only_experiment_needs_no_name(empty: Path, tmp_path: Path) -> None:
    uri = resolve_uri(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "runs")
    with pytest.raises(InputError, match="no such database"):
        compare(uri)
    assert not (tmp_path / "mlflow.db").exists()
    shutil.copy(empty, tmp_path / "mlflow.db")
    Store(MlflowClient(uri), uri, "only", tmp_path / "files").add("dctc", "1", 0, s1=0.5)
    assert [table.experiment for table in compare(uri)] == ["only"]


# ---- sweeps, headlines, what runs take


def test_a_sweeps_rows_its_headlines_and_what_is_not_finished(store: Store) -> None:
    cost = {"perf/train_seconds": [10.0], "perf/round_gflop": [2.5], "perf/peak_memory_gib": [1.25]}
    sweep = {"sweep": "table1"}
    store.add("mean_teacher", "1/8", 0, tags=sweep | {"row": "Mean Teacher", "headline": "ema"}, s1=0.9, ema=0.4)
    store.add("dctc", "1/8", 0, tags=sweep | {"row": "Ours"}, metrics=cost, s1=0.5, teacher=0.7)
    store.add("dctc", "1/8", 1, tags=sweep | {"row": "Ours"}, status="FAILED")
    store.add("dctc", "1/8", 0, tags={"sweep": "other", "row": "Ours"}, s1=0.1)
    store.client.set_terminated(
        store.client.create_run(store.id, tags={"kind": "sweep", "sweep": "table1"}).info.run_id
    )
    (table,) = compare(store.uri, store.name, sweep="table1")
    assert table.axes == ("row", "share")
    assert table.rows == [("Mean Teacher", "ema"), ("Mean Teacher", "s1"), ("Ours", "s1"), ("Ours", "teacher")]
    assert table.best("1/8") == 0.5
    assert str(table.costs["Ours"]) == "10 s, 2.5 GFLOP/round, 1.25 GiB"
    assert len(table.notes) == 1
    assert table.notes[0].startswith("1 run(s) failed: ")
    assert "2.5 GFLOP/round" in printed(table)
    with pytest.raises(InputError, match="has no sweep 'tabel1'; it has other, table1"):
        compare(store.uri, store.name, sweep="tabel1")


def test_several_networks_of_one_method_are_several_rows(store: Store) -> None:
    for network in ("unet", "u2net"):
        store.add("supervised", "1", 0, tags={"network": network}, params={"network.name": network}, s1=0.5)
    (table,) = compare(store.uri, store.name)
    assert [row for row, _ in table.rows] == ["supervised, u2net", "supervised, unet"]


def test_classes_of_a_row(store: Store) -> None:
    for seed, score in enumerate((0.4, 0.6)):
        iou = {"test/s1/iou/car": [score], "test/s1/iou/tree": [0.5], "test/teacher/iou/car": [0.9]}
        run = store.add("dctc", "1/2", seed, metrics=iou, s1=0.5)
        store.client.log_inputs(run, [DatasetInput(Dataset("towns", "d1", "local", "{}", profile=PROFILE))])
    (table,) = compare_classes(store.uri, store.name, beside="potsdam")
    assert table.rows == [("tree", "s1"), ("car", "s1")]  # as the dataset has them
    assert table.axes == ("class", "share")
    assert table.cells["car", "s1", "1/2"].scores == (0.4, 0.6)
    assert table.cells["car", "s1", "1/2"].printed == 78.8
    assert "dctc: test IoU" in printed(table)
    with pytest.raises(InputError, match=r"no row 'cps' .*; there are dctc"):
        compare_classes(store.uri, store.name, row="cps")


def test_classes_of_all_rows_side_by_side(store: Store) -> None:
    """A table a share, its columns the mean and then the dataset's classes; each row's headline alone."""
    for method, headline, share, car in (
        ("cps", "s1", "1/2", 0.2), ("dctc", "teacher", "1/2", 0.7), ("dctc", "teacher", "1/8", 0.1)
    ):  # fmt: skip
        iou = {f"test/{headline}/iou/{name}": [score] for name, score in (("car", car), ("tree", 0.5))}
        iou |= {"test/s2/iou/car": [0.99], f"test/{headline}/miou": [(car + 0.5) / 2]}
        run = store.add(method, share, 0, metrics=iou, tags={"headline": headline})
        store.client.log_inputs(run, [DatasetInput(Dataset("towns", "d1", "local", "{}", profile=PROFILE))])
    store.add("unclassed", "1/2", 0, s1=0.9)
    eighth, half = side_by_side(compare(store.uri, store.name))
    assert (eighth.columns, half.columns) == (["mIoU", "tree", "car"], ["mIoU", "tree", "car"])
    assert (eighth.rows, half.rows) == ([("dctc", "teacher")], [("cps", "s1"), ("dctc", "teacher")])
    scores = {(row, column): cell.mean for (row, _, column), cell in half.cells.items()}
    assert scores == pytest.approx(
        {("cps", "mIoU"): 0.35, ("cps", "tree"): 0.5, ("cps", "car"): 0.2}
        | {("dctc", "mIoU"): 0.6, ("dctc", "tree"): 0.5, ("dctc", "car"): 0.7}
    )
    assert (half.best("car"), half.best("mIoU")) == (0.7, 0.6)
    assert "share 1/2: test IoU" in printed(half)


def test_no_scores_by_class_is_no_table(store: Store) -> None:
    store.add("dctc", "1/2", 0, s1=0.5)
    assert side_by_side(compare(store.uri, store.name)) == []
