"""Runs as MLflow sees them: a real SQLite store, and a real server that is away, dies and comes back."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copyfile

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from dctc.tracking.remote import experiment_of
from dctc.tracking.run import (
    DatasetRecord,
    JsonTracker,
    MlflowTracker,
    RunSettings,
    SilentTracker,
    git_commit,
    open_tracker,
    resolve_uri,
    send_pending,
)
from dctc.tracking.store import client_of
from shards.errors import InputError

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with ``mlflow.db`` for the whole file, because making the tables takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder


@pytest.fixture
def settings(store: Path, request: pytest.FixtureRequest) -> RunSettings:
    """A run in an experiment of its own."""
    experiment = str(request.node.name)
    return RunSettings(
        folder=store / "runs" / experiment / "dctc-1-2-s0",
        experiment=experiment,
        name="dctc-1/2-s0",
        uri=resolve_uri(f"sqlite:///{store / 'mlflow.db'}", store / "runs"),
        tags={"method": "dctc", "labelled_share": "1/2", "seed": "0", "dataset_digest": DIGEST},
        params={"optimizer": {"lr": 0.001, "clip": None}, "data": {"dataset": "shards/x"}},
        dataset=DatasetRecord("potsdam", DIGEST, "/data/potsdam", {"tiles": {"train": 7}}),
    )


def lines(settings: RunSettings) -> list[dict[str, object]]:
    text = (settings.folder / "metrics.jsonl").read_text()
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in text.splitlines()
    ]


def run_of(settings: RunSettings) -> Run:
    """The one run of the test's experiment."""
    client = MlflowClient(settings.uri)
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    return runs[0]


def history(settings: RunSettings, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(settings.uri).get_metric_history(run_of(settings).info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def picture(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (10, 200, 30)).save(folder / name)
    return folder / name


def test_a_run_in_sqlite_has_everything(settings: RunSettings, store: Path) -> None:
    wide = replace(settings, params={**settings.params, **{f"key{i}": i for i in range(230)}, "long": "x" * 9000})
    tracker = MlflowTracker.start(wide)
    assert tracker.flush(60)
    assert tracker.run_id == run_of(settings).info.run_id
    for step in range(5):
        tracker.metrics({"train/loss/teacher": 1.0 / (step + 1), "train/lr": 1e-3}, step)
    tracker.picture(picture(settings.folder / "pictures", "a.png"), "val/tiles", 3)
    tracker.picture(picture(settings.folder / "pictures", "b.png"), "val/tiles", 4)
    tracker.artifact(picture(settings.folder, "confusion.png"))
    tracker.finish("FINISHED")
    run = run_of(settings)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "dctc-1/2-s0"
    assert settings.tags.items() <= run.data.tags.items()
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["optimizer.clip"] == "null"
    assert len(run.data.params) == 234
    assert len(run.data.params["long"]) == 6000
    assert history(settings, "train/loss/teacher") == [(step, 1.0 / (step + 1)) for step in range(5)]
    assert run.inputs is not None
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("potsdam", DIGEST[:36])
    assert json.loads(dataset.profile or "")["sha256"] == DIGEST
    client = MlflowClient(settings.uri)
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(path.split("+")[:3] for path in images) == [
        ["images/val~tiles", "step", "3"],
        ["images/val~tiles", "step", "4"],
    ]
    assert "confusion.png" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(store / "mlartifacts")
    assert not (settings.folder / "mlflow_pending.jsonl").exists()
    assert [line["step"] for line in lines(settings)] == [0, 1, 2, 3, 4]


def test_resume_continues_the_run_without_a_point_twice(settings: RunSettings) -> None:
    first = MlflowTracker.start(settings)
    for step in range(10):
        first.metrics({"loss": float(step)}, step)
    first.finish("KILLED")
    assert run_of(settings).info.status == "KILLED"
    params = {"optimizer": {"lr": 0.5}, "new": True}
    again = MlflowTracker.start(replace(settings, run_id=first.run_id, resumed_step=6, params=params))
    assert again.flush(60)
    assert again.run_id == first.run_id
    assert [line["step"] for line in lines(settings)] == [0, 1, 2, 3, 4, 5, 6]
    assert run_of(settings).info.status == "RUNNING"
    for step in range(7, 13):
        again.metrics({"loss": float(step)}, step)
    again.finish("FINISHED")
    assert [line["step"] for line in lines(settings)] == list(range(13))
    assert history(settings, "loss") == [(step, float(step)) for step in range(13)]
    run = run_of(settings)
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.tags["changed/optimizer.lr"] == "0.5"
    assert run.data.params["new"] == "true"


def test_a_killed_process_leaves_no_gap(settings: RunSettings) -> None:
    """Nothing was flushed and no id was remembered: the run's folder alone must suffice."""
    script = (
        "import os, sys; from pathlib import Path; from dctc.tracking.run import MlflowTracker, RunSettings\n"
        "t = MlflowTracker.start(RunSettings(Path(sys.argv[1]), sys.argv[2], 'n', sys.argv[3]))\n"
        "assert t.await_run_id()\n"  # a machine with much to do may take longer than the start waits
        "for step in range(50): t.metrics({'loss': step}, step)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, str(settings.folder), settings.experiment, settings.uri]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with (settings.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 50, "tim')  # as a power cut would leave it
    assert run_of(settings).data.metrics.get("loss") != 49.0
    tracker = MlflowTracker.start(replace(settings, resumed_step=40))
    for step in range(41, 45):
        tracker.metrics({"loss": step}, step)
    tracker.finish("FINISHED")
    assert history(settings, "loss") == [(step, float(step)) for step in range(45)]
    assert [line["step"] for line in lines(settings)] == list(range(45))


def test_runs_that_start_together_make_one_database(tmp_path: Path) -> None:
    """MLflow alone makes the tables of a new file twice then, and leaves one that no later run can use."""
    script = (
        "import sys, time; from pathlib import Path; from dctc.tracking.store import load_mlflow\n"
        "from dctc.tracking.run import MlflowTracker, RunSettings\n"
        "folder = Path(sys.argv[1]); load_mlflow(); (folder / 'ready').touch()\n"
        "while not (folder.parent / 'go').exists(): time.sleep(0.001)\n"
        "t = MlflowTracker.start(RunSettings(folder, 'together', folder.name, sys.argv[2]))\n"
        "t.metrics({'loss': 0.5}, 0); assert t.flush(60); t.finish('FINISHED')\n"
    )
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(folder), uri], stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    try:
        end = time.monotonic() + 120
        while not all((folder / "ready").exists() for folder in folders):
            assert time.monotonic() < end
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        (tmp_path / "go").touch()
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert not any("takes nothing" in text for text in said), said
    assert all(not (folder / "mlflow_pending.jsonl").exists() for folder in folders)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("together")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == ["a", "b", "c"]
    assert all(run.data.metrics["loss"] == 0.5 for run in runs)


def test_a_new_database_is_whole_whenever_its_maker_is_killed(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    draft = tmp_path / ".mlflow.db.new"
    script = f"from dctc.tracking.store import client_of; client_of({uri!r})"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not (draft.exists() and draft.stat().st_size):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()
    assert len(client_of(uri).search_experiments()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_a_run_deleted_on_the_server_is_made_anew_with_its_history(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    first = MlflowTracker.start(settings)
    first.metrics({"loss": 1.0}, 1)
    first.finish("KILLED")
    MlflowClient(settings.uri).delete_run(str(first.run_id))
    again = MlflowTracker.start(replace(settings, run_id=first.run_id, resumed_step=1))
    again.metrics({"loss": 2.0}, 2)
    again.finish("FINISHED")
    assert again.run_id not in (None, first.run_id)
    assert history(settings, "loss") == [(1, 1.0), (2, 2.0)]
    assert "a new run gets the whole history" in caplog.text


def test_values_that_are_not_finite(settings: RunSettings) -> None:
    tracker = MlflowTracker.start(settings)
    tracker.metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}, 0)
    tracker.finish("FINISHED")
    (line,) = lines(settings)
    assert line["values"] == {"a": None, "b": None, "c": None, "d": 1.5}
    assert line["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    metrics = run_of(settings).data.metrics
    assert metrics["d"] == 1.5
    assert all(math.isnan(metrics[name]) for name in "abc")


def test_what_mlflow_refuses_does_not_hold_up_the_rest(settings: RunSettings, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MlflowTracker.start(settings)
    tracker.metrics({"test/s1/iou/low vegetation (grass)": 0.25}, 1)
    gone = picture(settings.folder, "gone.png")
    tracker.picture(gone, "val/tiles", 1)
    gone.unlink()
    tracker.picture(picture(settings.folder, "here.png"), "val/caf\u00e9", 2)
    tracker.finish("FINISHED")
    run = run_of(settings)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"test/s1/iou/low vegetation _grass_": 0.25}
    images = [file.path for file in MlflowClient(settings.uri).list_artifacts(run.info.run_id, "images")]
    assert {path.split("+")[0] for path in images} == {"images/val~caf_"}
    assert "gone.png is gone" in caplog.text


def test_a_fresh_run_starts_its_file_anew(settings: RunSettings) -> None:
    for value in (1.0, 2.0):
        tracker = JsonTracker(settings.folder)
        tracker.metrics({"loss": value}, 0)
        tracker.finish("FINISHED")
    assert [line["values"] for line in lines(settings)] == [{"loss": 2.0}]


def test_open_tracker_by_rank_and_switch(settings: RunSettings) -> None:
    silent = open_tracker(settings, main_process=False)
    silent.metrics({"loss": 1.0}, 0)
    silent.finish("FINISHED")
    assert isinstance(silent, SilentTracker)
    assert not settings.folder.exists()
    plain = open_tracker(settings, main_process=True, enabled=False)
    plain.metrics({"loss": 1.0}, 0)
    plain.finish("FINISHED")
    assert isinstance(plain, JsonTracker)
    assert [path.name for path in settings.folder.iterdir()] == ["metrics.jsonl"]


def test_resolve_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None, Path("runs")) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:///here.db", Path("runs")) == f"sqlite:///{tmp_path}/here.db"
    assert resolve_uri("postgresql+psycopg2://u:p@h/db", Path("runs")) == "postgresql+psycopg2://u:p@h/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert resolve_uri(None, Path("runs")) == "http://tracking:5000"
    assert resolve_uri("https://other", Path("runs")) == "https://other"
    for bad in ("mlruns", "file:///tmp/mlruns", "htp://x"):
        with pytest.raises(InputError, match=r"tracking\.uri"):
            resolve_uri(bad, Path("runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        resolve_uri(None, Path("runs"))


@pytest.mark.parametrize("name", ["plain #1 \u00e9", "a 50%20x", "50%25?x=1"])
def test_a_store_is_where_its_folder_is_whatever_its_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    uri = resolve_uri(None, folder / "runs")
    assert ("%" in uri) == ("%" in name or "?" in name)
    assert resolve_uri(uri, Path("runs")) == uri
    client = client_of(uri)
    experiment = client.get_experiment(experiment_of(client, "odd"))
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]  # MLflow leaves an empty folder of the quoted name
    assert {path.parent for path in files} == {folder}


def test_a_store_that_was_moved_is_told(tmp_path: Path, empty: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "before").mkdir()
    copyfile(empty, tmp_path / "before" / "mlflow.db")
    client = client_of(f"sqlite:///{tmp_path}/before/mlflow.db")
    experiment_of(client, "towns")
    experiment_of(client, "towns")
    assert not caplog.records
    (tmp_path / "before").rename(tmp_path / "after")
    experiment_of(client_of(f"sqlite:///{tmp_path}/after/mlflow.db"), "towns")
    assert "towns keeps its files in file://" in caplog.text
    assert "was mlflow.db moved?" in caplog.text


def test_git_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    clean = git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{clean}-dirty"


class Server:
    """``mlflow server`` on a loopback port that stays the same over restarts."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        stores += ["--artifacts-destination", str(self.folder / "served")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options, *stores],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        pytest.fail(f"mlflow server did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End it and its workers at once, as a power cut would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Not started yet; always ended."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    server = Server(store)
    yield server
    server.kill()


def timed(tracker: MlflowTracker, steps: range) -> float:
    """Log ``steps`` and return the seconds it took: one blocked call a step would be tens of seconds."""
    start = time.perf_counter()
    for step in steps:
        tracker.metrics({"loss": float(step)}, step)
    return time.perf_counter() - start


@pytest.mark.slow
def test_server_away_at_start_and_at_the_end(
    settings: RunSettings, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(settings, uri=server.uri)
    pending = settings.folder / "mlflow_pending.jsonl"
    start = time.monotonic()
    tracker = MlflowTracker.start(settings)
    assert tracker.run_id is None
    assert timed(tracker, range(100)) < 3
    tracker.picture(picture(settings.folder / "pictures", "p.png"), "val/tiles", 9)
    tracker.finish("KILLED")
    assert time.monotonic() - start < 40
    assert len([r for r in caplog.records if pending.name in r.getMessage()]) == 1
    assert len(lines(settings)) == 100

    resumed = MlflowTracker.start(replace(settings, resumed_step=79))  # still away
    timed(resumed, range(80, 110))
    resumed.finish("FINISHED")
    assert [json.loads(line).get("kind") for line in pending.read_text().splitlines()] == [None, "picture", "status"]
    with pytest.raises(Exception, match="refused"):
        send_pending(settings.folder)
    assert pending.exists()

    server.start()
    settings = replace(settings, folder=settings.folder.rename(settings.folder.with_name("moved")))
    pending = settings.folder / pending.name
    run_id = send_pending(settings.folder)
    run = run_of(settings)
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.tags["method"] == "dctc"
    assert history(settings, "loss") == [(step, float(step)) for step in range(110)]
    assert len(MlflowClient(settings.uri).list_artifacts(run.info.run_id, "images")) == 2
    assert not pending.exists()
    assert send_pending(settings.folder) is None


@pytest.mark.slow
def test_server_dies_and_comes_back_while_training(
    settings: RunSettings, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(settings, uri=server.uri)
    pending = settings.folder / "mlflow_pending.jsonl"
    server.start()
    tracker = MlflowTracker.start(settings)
    timed(tracker, range(20))
    assert tracker.flush(20)
    assert history(settings, "loss") == [(step, float(step)) for step in range(20)]
    server.kill()
    assert timed(tracker, range(20, 60)) < 3
    tracker.picture(picture(settings.folder / "pictures", "p.png"), "val/tiles", 30)
    assert not tracker.flush(20)
    assert pending.exists()  # a kill -9 now would lose nothing
    assert timed(tracker, range(60, 80)) < 3
    server.start()
    assert tracker.flush(30)
    assert not pending.exists()
    tracker.finish("FINISHED")
    assert history(settings, "loss") == [(step, float(step)) for step in range(80)]
    assert run_of(settings).info.status == "FINISHED"
    warnings = [r.getMessage() for r in caplog.records if r.name == "dctc.tracking" and r.levelno >= logging.WARNING]
    assert ["takes nothing now" in text for text in warnings] == [True, False]


def test_a_server_that_accepts_and_never_answers_slows_nothing(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        tracker = MlflowTracker.start(replace(settings, uri=uri))
        assert timed(tracker, range(50)) < 3
        tracker.finish("KILLED")
        assert time.monotonic() - start < 40
    assert (settings.folder / "mlflow_pending.jsonl").exists()
    assert len(lines(settings)) == 50
