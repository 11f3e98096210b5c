"""Tables made from the runs of a real MLflow store."""

from __future__ import annotations

import csv
import math
import socket
import sqlite3
import statistics
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from dctc.tracking.compare import Comparison, compare, write_csv
from dctc.tracking.run import resolve_uri
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
        **scores: float,
    ) -> None:
        tags = {"method": method, "labelled_share": share, "seed": str(seed), "dataset_digest": digest}
        self.time += 1000
        run = self.client.create_run(self.id, start_time=self.time, tags=tags).info.run_id
        for net, score in scores.items():
            self.client.log_metric(run, f"test/{net}/miou", score)
        for key, value in (params or {}).items():
            self.client.log_param(run, key, value)
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
        console.print(table.table())
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
    cell = table.cells["dctc", "s1", "1/2"]
    assert math.isclose(cell.mean, 0.73)
    assert cell.std is not None
    assert math.isclose(cell.std, statistics.stdev((0.70, 0.72, 0.77)))
    text = printed(table)
    assert "73.0 ± 3.6 (3)" in text
    assert "80.1 (1)" in text
    bold = printed(table, styled=True)
    assert "\x1b[1m74.0 ± 3.6 (3)" in bold
    assert "\x1b[1m73.0" not in bold
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
    assert table.notes == ("dctc, 1/2: 1 earlier run(s) of the same seed left out",)


def test_runs_of_different_configuration_in_one_cell_are_pointed_out(store: Store) -> None:
    for seed, width in enumerate(("16", "32")):
        params = {"network.width": width, "run.seed": str(seed), "optimizer.lr": "0.001"}
        store.add("dctc", "1/2", seed, params=params, s1=0.5)
        store.add("unet", "1/2", 0, params=params, s1=0.5)  # the later replaces the earlier, and may not do so unseen
    (table,) = compare(store.uri, store.name)
    assert table.notes == (
        "dctc, 1/2: these runs also differ in network.width",
        "unet, 1/2: 1 earlier run(s) of the same seed left out",
        "unet, 1/2: these runs also differ in network.width",
    )
    assert "network.width" in printed(table)


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
