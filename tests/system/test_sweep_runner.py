"""How a sweep treats its processes: stand-ins for the trainer that end in every way, and a database to tell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow.tracking import MlflowClient

from dctc.config import Config
from dctc.sweep.plan import PlannedRun, Sweep, load_sweep
from dctc.sweep.run import LOG, SweepRunner, is_done
from dctc.tracking import delivery
from dctc.tracking.parent import ParentRun
from dctc.tracking.run import RunSettings, open_tracker
from tests.tiny import ROOT, write_config

# What every stand-in begins with: `name` of its run, `told` what is to be kept of it.
HEAD = """
import json, os, signal, sys, time
from pathlib import Path
name = next(a.split("=")[1].strip('"').replace("/", "_") for a in sys.argv if a.startswith("run.name="))
told = Path(sys.argv[0]).parent / (name + ".told")
"""

Make = Callable[..., Sweep]


@pytest.fixture
def make(tmp_path: Path, tiny_dataset: Path) -> Make:
    """Makes a sweep of one row with the given number of seeds, and sections of its config."""

    def made(seeds: int, **sections: dict[str, Any]) -> Sweep:
        file = write_config(tmp_path / "cps.yaml", tiny_dataset, "cps", **sections)
        sweep = {"name": "t", "seeds": list(range(seeds)), "rows": [{"row": "a", "config": file.name}]}
        path = tmp_path / "t.yaml"
        path.write_text(yaml.safe_dump(sweep))
        return load_sweep(path)

    return made


def stand_in(folder: Path, body: str) -> list[str]:
    script = folder / "stand_in.py"
    script.write_text(HEAD + body)
    return [sys.executable, str(script)]


def runs(sweep: Sweep, command: list[str], jobs: int = 1, gpus: bool = False) -> tuple[int, list[str]]:
    """The exit code and what it showed."""
    lines: list[str] = []
    return SweepRunner(sweep, command, lines.append, jobs, gpus)(), lines


def test_runs_at_once_have_a_gpu_and_a_part_of_the_cores_each(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5e")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    body = """
told.write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]]))
deadline = time.monotonic() + 30
while len(list(told.parent.glob("*.told"))) < 2:  # the first two wait for each other
    assert time.monotonic() < deadline
    time.sleep(0.01)
time.sleep(0.5 if "s0" in name else 0)  # so the third takes the place of the second
"""
    status, lines = runs(make(3), stand_in(tmp_path, body), jobs=2, gpus=True)
    assert status == 0, lines
    found = {path.stem[-2:]: json.loads(path.read_text()) for path in tmp_path.glob("*.told")}
    assert found == {"s0": ["3", "4"], "s1": ["GPU-5e", "4"], "s2": ["GPU-5e", "4"]}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-5e"


def test_one_that_is_killed_stops_no_other(make: Make, tmp_path: Path) -> None:
    sweep = make(2)
    body = "print('the last words', flush=True)\nif 's0' in name: os.kill(os.getpid(), signal.SIGKILL)\n"
    status, lines = runs(sweep, stand_in(tmp_path, body))
    assert status == 1
    assert lines[1].startswith("[1/2] a 1/2 seed 0: FAILED by signal 9 (Killed), ")
    assert lines[3].startswith("[2/2] a 1/2 seed 1: no test, ")
    assert lines[4:] == [f"failed: a 1/2 seed 0, {sweep.runs[0].folder / LOG} ends with", "    the last words"]


def test_one_that_was_asked_to_stop_stops_the_sweep_and_a_second_signal_hurries_nobody(
    make: Make, tmp_path: Path
) -> None:
    """As SLURM does it: each process of a step has the signal, the sweep after one of its runs."""
    body = """
if "s0" in name:
    while not list(told.parent.glob("*s1.told")):
        time.sleep(0.01)
    sys.exit(75)
def saves(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.5)
    told.write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, saves)
told.write_text("begun")
time.sleep(60)
"""
    status, lines = runs(make(3), stand_in(tmp_path, body), jobs=2)
    assert status == 75, lines
    assert [path.read_text() for path in tmp_path.glob("*.told")] == ["saved"]
    assert [line for line in lines if "begins" not in line] == [
        "[1/3] a 1/2 seed 0: was asked to stop, and so the sweep stops",
        "[2/3] a 1/2 seed 1: stopped; the same command goes on",
    ]


def test_ranks_that_end_after_their_launcher_are_waited_for(make: Make, tmp_path: Path) -> None:
    body = """
ready, say = os.pipe()
if os.fork():
    os.read(ready, 1)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)  # dies at once of the signal that it gets
def saves(*_):
    time.sleep(0.7)
    told.write_text("saved")
    os._exit(75)
signal.signal(signal.SIGTERM, saves)
os.write(say, b"1")
time.sleep(60)
"""
    status, lines = runs(make(1), stand_in(tmp_path, body))
    assert (status, lines[-1]) == (75, "[1/1] a 1/2 seed 0: stopped; the same command goes on")
    assert [path.read_text() for path in tmp_path.glob("*.told")] == ["saved"]


def test_the_second_ctrl_c_ends_at_once(make: Make, tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
os.kill(os.getppid(), signal.SIGINT)
while True:
    time.sleep(1)
"""
    before, handler = time.monotonic(), signal.getsignal(signal.SIGINT)  # a worker of pytest-xdist has one of its own
    status, _ = runs(make(1), stand_in(tmp_path, body))
    assert status == 75
    assert time.monotonic() - before < 30
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_ctrl_c_while_the_first_is_passed_on_is_the_second(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SweepRunner(make(1), [], print)
    told: list[int] = []

    def tell(number: int) -> None:
        told.append(number)
        if len(told) == 1:
            runner._stop(signal.SIGINT, None)

    monkeypatch.setattr(runner, "_signal", tell)
    runner._stop(signal.SIGINT, None)
    assert told == [signal.SIGTERM, signal.SIGKILL]


@pytest.mark.slow
def test_runs_end_with_a_sweep_that_is_killed(make: Make, tmp_path: Path) -> None:
    make(1)
    body = """
sys.path.insert(0, ROOT)
from dctc.engine.faults import end_with_launcher
from dctc.engine.preempt import StopRequest
stop = StopRequest()
end_with_launcher()
told.write_text(str(os.getpid()))
while stop.received is None:
    time.sleep(0.05)
told.write_text(stop.received)
""".replace("ROOT", repr(str(ROOT)))
    sweeping = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from dctc.sweep.plan import load_sweep
from dctc.sweep.run import SweepRunner
SweepRunner(load_sweep(Path({str(tmp_path / "t.yaml")!r})), {stand_in(tmp_path, body)}, print)()
"""
    process = subprocess.Popen([sys.executable, "-c", sweeping], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := [path for path in tmp_path.glob("*.told") if path.read_text()]):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = psutil.Process(int(found[0].read_text()))
    process.kill()
    process.wait()
    assert psutil.wait_procs([child], timeout=30)[1] == []
    assert found[0].read_text() == "SIGTERM"


# ---- what is finished


def finish(run: PlannedRun, **report: Any) -> None:
    """The files of a finished run, as the trainer leaves them."""
    run.folder.mkdir(parents=True)
    settled = run.config.plain()
    settled["precision"]["dtype"] = "fp32"
    (run.folder / "config.yaml").write_text(yaml.safe_dump(settled))
    written = {"dataset": run.dataset, "tested": True, "headline": "s1", "test": None}
    (run.folder / "report.json").write_text(json.dumps(written | report))


def other_rounds(config: Config) -> Config:
    return config.model_copy(update={"schedule": config.schedule.model_copy(update={"rounds": 7})})


def test_what_is_finished_is_known_by_dataset_settings_and_test(make: Make) -> None:
    (run,) = make(1, evaluation={"test": True}).runs
    assert not is_done(run)
    finish(run)
    assert is_done(run)
    settings = run.folder / "config.yaml"
    written = settings.read_text()
    assert "\n  cutmix: false\n" in written
    earlier = yaml.safe_load(written)
    del earlier["method"]["cutmix"], earlier["data"]["cutmix"]
    settings.write_text(yaml.safe_dump(earlier))
    assert is_done(run), "by a version that had not these keys"
    settings.write_text(yaml.safe_dump(earlier | {"method": earlier["method"] | {"cutmix": True}}))
    assert not is_done(run)
    settings.write_text(written)
    assert not is_done(replace(run, dataset="another")), "packed anew in the same folder"
    assert not is_done(replace(run, config=other_rounds(run.config)))
    (run.folder / "report.json").write_text(json.dumps({"dataset": run.dataset, "tested": False}))
    assert not is_done(run), "it was to be tested"
    finish_again = json.dumps({"dataset": run.dataset, "tested": True})
    (run.folder / "report.json").write_text(finish_again)
    assert is_done(run)
    (run.folder / "config.yaml").write_text("data: {dataset: x}\nformer: 1\n")
    assert not is_done(run), "of another version: for the trainer to explain"
    (run.folder / "report.json").write_text(finish_again[:9])
    assert not is_done(run)


def test_runs_that_mlflow_has_not_got_are_sent_and_find_their_parent(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: Path
) -> None:
    """The server was away while a run was made; when it is back the same sweep has nothing to run, and all to send."""
    monkeypatch.setattr(delivery, "AWAY_PATIENCE", 0.1)
    database = tmp_path / "away" / "mlflow.db"
    database.parent.touch()  # a file where its folder is to be
    sweep = make(1, tracking={"enabled": True, "uri": f"sqlite:///{database}"})
    (run,) = sweep.runs
    tracker = open_tracker(
        RunSettings(run.folder, "towns-scene", "t-a-s0", f"sqlite:///{database}", run.config.tracking.tags),
        main_process=True,
    )
    tracker.metrics({"test/s1/miou": 0.5}, 3)
    tracker.finish("FINISHED")
    assert (run.folder / delivery.PENDING).exists()
    for file in run.folder.iterdir():
        file.rename(tmp_path / file.name)
    run.folder.rmdir()
    finish(run)
    for name in (delivery.PENDING, "mlflow.json", "metrics.jsonl"):
        (tmp_path / name).rename(run.folder / name)
    never = stand_in(tmp_path, "told.touch()")
    assert runs(sweep, never)[0] == 0

    database.parent.unlink()
    database.parent.mkdir()
    database.write_bytes(empty.read_bytes())
    status, lines = runs(sweep, never)
    assert (status, lines) == (0, ["[1/1] a 1/2 seed 0: no test (was finished)"])
    client = MlflowClient(f"sqlite:///{database}")
    (child,) = client.search_runs(experiments(client, "towns-scene"))
    (parent,) = client.search_runs(experiments(client, sweep.experiment))
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.data.metrics["test/s1/miou"], child.info.status, parent.info.status) == (0.5, "FINISHED", "FINISHED")
    assert parent.data.params == {"rows": "a", "shares": "1/2", "seeds": "0", "runs": "1", "overrides": ""}

    client.delete_run(parent.info.run_id)
    assert runs(sweep, never)[0] == 0
    (parent,) = client.search_runs(experiments(client, sweep.experiment))
    assert client.get_run(child.info.run_id).data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert not list(tmp_path.glob("*.told"))


def test_jobs_that_begin_parts_of_one_sweep_together_have_one_parent(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    plan, folder = tmp_path / "t.yaml", tmp_path / "sweep"
    plan.write_text("name: t")
    folder.mkdir()
    client = MlflowClient(uri)
    client.create_experiment("parts")  # the database is there

    def begin(_: int) -> str | None:
        return ParentRun(folder, uri, ("parts", "t"), {}, plan).run_id

    with ThreadPoolExecutor(4) as pool:
        parents = set(pool.map(begin, range(4)))
    found = client.search_runs(experiments(client, "parts"))
    assert parents == {run.info.run_id for run in found}
    assert len(found) == 1


def experiments(client: MlflowClient, name: str) -> list[str]:
    found = client.get_experiment_by_name(name)
    assert found is not None
    return [found.experiment_id]
