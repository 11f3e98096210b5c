"""Tables made from the runs of a real MLflow store."""

from __future__ import annotations

import csv
import math
import socket
import sqlite3
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from dctc.tracking import paper
from dctc.tracking.charts import write_figure6
from dctc.tracking.compare import Comparison, compare, compare_classes
from dctc.tracking.histories import histories
from dctc.tracking.page import Extras, page
from dctc.tracking.run import resolve_uri
from dctc.tracking.tables import markdown, terminal_table, write_csv
from shards.errors import InputError


class Store:
    """An experiment to put finished runs into."""

    def __init__(self, client: MlflowClient, uri: str, name: str) -> None:
        self.client, self.uri, self.name = client, uri, name
        self.id = client.create_experiment(name)
        self.time = 1_700_000_000_000

    def add(
        self,
        method: str,
        share: str,
        seed: int | str,
        digest: str = "d1",
        status: str = "FINISHED",
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
        metrics: dict[str, list[float]] | None = None,
        **scores: float,
    ) -> None:
        own = {"method": method, "labelled_share": share, "seed": str(seed), "dataset_digest": digest}
        tags = own | (tags or {})
        self.time += 1000
        run = self.client.create_run(self.id, start_time=self.time, tags=tags).info.run_id
        for net, score in scores.items():
            self.client.log_metric(run, f"test/{net}/miou", score)
        for key, value in (params or {}).items():
            self.client.log_param(run, key, value)
        for key, values in (metrics or {}).items():
            for step, number in enumerate(values):
                self.client.log_metric(run, key, number, step=step)
        self.client.set_terminated(run, status)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables made, which takes seconds, to be copied."""
    path = tmp_path_factory.mktemp("compare") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty: Path, request: pytest.FixtureRequest) -> Store:
    uri = f"sqlite:///{empty}"
    return Store(MlflowClient(uri), uri, str(request.node.name))


def printed(table: Comparison, styled: bool = False) -> str:
    console = Console(width=120, force_terminal=styled, color_system="standard", legacy_windows=False)
    with console.capture() as capture:
        console.print(terminal_table(table))
    return capture.get()


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


def test_csv_is_unrounded(store: Store, tmp_path: Path) -> None:
    store.add("dctc", "1/2", 0, s1=1 / 3)
    store.add("dctc", "1/2", 1, s1=2 / 3)
    write_csv(compare(store.uri, store.name), tmp_path / "table.csv")
    (line,) = csv.DictReader((tmp_path / "table.csv").open())
    assert (line["row"], line["net"], line["column"], line["seeds"]) == ("dctc", "s1", "1/2", "2")
    assert float(line["mean"]) == statistics.fmean((1 / 3, 2 / 3))
    assert float(line["std"]) == statistics.stdev((1 / 3, 2 / 3))


def test_unknown_and_empty_experiments_are_named(store: Store) -> None:
    with pytest.raises(InputError, match="no finished run with a test miou"):
        compare(store.uri, store.name)
    with pytest.raises(InputError, match=f"no experiment 'potsdm'.*{store.name}"):
        compare(store.uri, "potsdm")


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
    with sqlite3.connect(empty) as source, sqlite3.connect(tmp_path / "mlflow.db") as copy:
        source.backup(copy)
        copy.execute("DELETE FROM experiments WHERE name != 'Default'")
    Store(MlflowClient(uri), uri, "only").add("dctc", "1", 0, s1=0.5)
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
        store.add("dctc", "1/2", seed, metrics=iou, s1=0.5)
    (table,) = compare_classes(store.uri, store.name, beside="potsdam")
    assert table.axes == ("class", "share")
    assert table.cells["car", "s1", "1/2"].scores == (0.4, 0.6)
    assert table.cells["car", "s1", "1/2"].printed == 78.8
    assert "dctc: test IoU" in printed(table)
    with pytest.raises(InputError, match=r"no row 'cps' .*; there are dctc"):
        compare_classes(store.uri, store.name, row="cps")


# ---- the paper's figures


@pytest.mark.parametrize("dataset", paper.DATASETS)
def test_the_papers_table_1_is_the_mean_of_its_table_2(dataset: str) -> None:
    for column, share in enumerate(paper.SHARES):
        mean = statistics.fmean(row[column] or math.nan for row in paper.TABLE_2[dataset].values())
        assert paper.printed(dataset, "Ours", share) == pytest.approx(mean, abs=0.0501)
    assert paper.printed(dataset, "Ours", "0.5") == paper.TABLE_3[dataset]["Ours"]
    assert paper.printed(dataset, "Baseline", "1/2") == paper.TABLE_3[dataset]["Baseline"]
    assert paper.printed(dataset, "Baseline", "1/4") is None
    assert paper.printed(dataset, "U-Net", "1/2") is None


def test_the_papers_figure_and_the_difference_stand_beside_each_cell(store: Store) -> None:
    store.add("dctc", "1/8", 0, s1=0.722)
    store.add("dctc", "10%", 0, s1=0.6)
    (table,) = compare(store.uri, store.name, beside="potsdam")
    assert str(table.cells["dctc", "s1", "1/8"]) == "72.2 (1), paper 71.2, +1.0"
    assert str(table.cells["dctc", "s1", "1/10"]) == "60.0 (1)"


# ---- the page


class Reader(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = '<script>alert("x")</script>'


def test_the_page_is_whole_in_itself_and_no_name_can_break_it(store: Store) -> None:
    pseudo = {f"train/pseudo/s1/{key}": [0.1, 0.2, 0.3] for key in ("miou", "iou/car")}
    for share, score in (("1/8", 0.5), ("1/2", 0.6)):
        store.add(HOSTILE, share, 0, metrics=pseudo | {"train/dying/s1": [0.0, 2.0]}, s1=score)
        store.add("supervised", share, 0, s1=score - 0.1)
    store.add("supervised", "1", 0, s1=0.7)
    (table,) = compare(store.uri, store.name)
    curves = histories(store.uri, table)
    assert [c.caption for c in curves if HOSTILE in c.caption][:3] == [
        f"{HOSTILE}, share 1/8: mIoU on unlabelled tiles, %",
        f"{HOSTILE}, share 1/8: IoU of s1 there, %",
        f"{HOSTILE}, share 1/8: dying classes",
    ]
    assert curves[0].lines[0].points[-1] == pytest.approx((2.0, 30.0, 0.0))
    extras = Extras(curves, [(f"a {HOSTILE}", b"png")], [f"no tiles of {HOSTILE}"])
    text = page([table], [extras], f"dctc compare {HOSTILE}")
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("script") == 1, "the page's own"
    assert HOSTILE in reader.text
    assert {"table", "svg", "polyline", "details", "img"} <= set(reader.tags)
    assert ("name", "viewport") in reader.attributes
    links = [value for name, value in reader.attributes if name in ("src", "href", "action") and value]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "://" not in text
    assert "url(" not in text
    assert "60.0 (1)" in reader.text
    assert ("data-sort", "0.6") in reader.attributes


def test_figure_6_as_files(store: Store, tmp_path: Path) -> None:
    for share, score in (("10%", 0.5), ("50%", 0.6), ("100%", 0.65)):
        store.add("dctc", share, 0, s1=score)
        store.add("dctc", share, 1, s1=score + 0.02)
    store.add("supervised", "1", 0, s1=0.55)
    tables = compare(store.uri, store.name)
    for name in ("figure.png", "figure.svg"):
        write_figure6(tables, tmp_path / name)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "figure.svg").read_bytes()
    write_figure6(tables, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == before
    with pytest.raises(InputError, match=r"a figure is a \.png or a \.svg file"):
        write_figure6(tables, tmp_path / "figure.jpg")


def test_markdown(store: Store) -> None:
    store.add("a|b", "1/2", 0, s1=0.5)
    store.add("dctc", "1/2", 0, s1=0.6, teacher=0.9)
    lines = markdown(compare(store.uri, store.name)).splitlines()
    assert "| a\\|b | s1 | 50.0 (1) |  |" in lines
    assert "| dctc | s1 | **60.0 (1)** |  |" in lines
    assert "| dctc | teacher | 90.0 (1) |  |" in lines
