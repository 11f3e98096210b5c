"""A table of runs: as typed, stopped and gone on with, with a run that fails; its runs under one parent in MLflow."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from dctc.cli import app
from dctc.config import load_config
from dctc.engine.build import resolve
from dctc.sweep.plan import choose, load_sweep
from shards.errors import InputError
from tests.tiny import command_line, run, start, write_config


@pytest.fixture
def configs(tmp_path: Path, tiny_dataset: Path) -> Path:
    """A folder with configs of two methods that track into a database beside the runs."""
    for method in ("supervised", "cps"):
        tracking = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"}
        file = write_config(
            tmp_path / f"{method}.yaml", tiny_dataset, method, schedule={"rounds": 3}, tracking=tracking,
            evaluation={"test": True, "every": 0},
        )  # fmt: skip
        config = yaml.safe_load(file.read_text())
        del config["run"]["name"], config["data"]["labelled_share"]
        file.write_text(yaml.safe_dump(config))
    return tmp_path


def write(folder: Path, **keys: Any) -> Path:
    sweep = {
        "name": "table", "seeds": [0], "shares": ["1/4", "1/2"],
        "rows": [{"row": "U-Net", "config": "supervised.yaml", "shares": [1]}, {"row": "CPS", "config": "cps.yaml"}],
    }  # fmt: skip
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(sweep | keys))
    return path


def dry_run(sweep: Path, *overrides: str) -> list[str]:
    return (
        CliRunner()
        .invoke(app, ["sweep", str(sweep), *overrides, "--dry-run"], catch_exceptions=False)
        .output.splitlines()
    )


@pytest.mark.matrix
@pytest.mark.slow
def test_a_sweep_is_stopped_goes_on_and_leaves_a_failed_run_behind(configs: Path) -> None:
    broken = {"row": "broken", "config": "cps.yaml", "shares": ["1/2"], "set": {"optimizer.lr": 1e30}}
    cps = {"row": "CPS", "config": "cps.yaml", "shares": ["1/2"]}
    rows = [{"row": "U-Net", "config": "supervised.yaml", "shares": [1]}, broken, cps]
    sweep = write(configs, rows=rows)
    dry = dry_run(sweep)
    assert [line.split(":")[0] for line in dry] == [
        "[1/3] U-Net 1 seed 0", "[2/3] broken 1/2 seed 0", "[3/3] CPS 1/2 seed 0",
    ]  # fmt: skip
    assert not (configs / "runs").exists()

    runs = configs / "runs" / "synthetic-scene"
    first = runs / "table-u-net-1-s0"
    process = start(["dctc", "sweep", sweep, "schedule.rounds=4"], first / "checkpoints")  # overrides hold for all
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    others = [command_line(child) for child in psutil.Process().children(recursive=True)]
    assert not [line for line in others if "train.py" in line], "runs outlive the sweep"

    done = run("dctc", "sweep", sweep, "schedule.rounds=4", check=False)
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "begins" not in line]
    assert lines[0].startswith("[1/3] U-Net 1 seed 0: test mIoU ")
    assert lines[1].startswith("[2/3] broken 1/2 seed 0: FAILED with exit code 1")
    assert lines[2].startswith("[3/3] CPS 1/2 seed 0: test mIoU ")
    assert f"failed: broken 1/2 seed 0, {runs / 'table-broken-1_2-s0' / 'train.log'} ends with" in lines
    assert "is not finite" in done.stdout
    dry = dry_run(sweep, "schedule.rounds=4")
    assert [line.rpartition(" ")[2] for line in dry] == ["finished", "begun", "finished"]

    client = MlflowClient(f"sqlite:///{configs}/mlflow.db")
    experiment = client.get_experiment_by_name("synthetic-scene")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in found if r.data.tags.get("kind") == "sweep"]
    children = [r for r in found if r is not parent]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert parent.info.status == "FAILED"
    assert {(r.data.tags["row"], r.data.tags["labelled_share"], r.info.status) for r in children} == {
        ("U-Net", "1", "FINISHED"), ("CPS", "1/2", "FINISHED"), ("broken", "1/2", "FAILED"),
    }  # fmt: skip
    assert {(r.data.tags["headline"], r.data.tags["network"]) for r in children} == {("s1", "unet")}
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["table.yaml"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"seed": [1]}, "unknown key seed; did you mean 'seeds'?"),
        ({"rows": [{"row": "a", "config": "cps.yaml", "share": [1]}]}, "unknown key rows.0.share; did you mean"),
        ({"rows": [{"row": "a"}]}, "key rows.0.config is missing"),
        ({"rows": []}, r"key rows is \[\]"),
        ({"shares": []}, r"key shares is \[\]"),
        ({"rows": [{"row": "a", "config": "cps.yaml", "seeds": []}]}, r"key rows.0.seeds is \[\]"),
        ({"rows": [{"row": "a", "config": "cps.yaml", "times": 0}]}, "key rows.0.times is 0"),
        ({"name": "a/b"}, "key name is 'a/b'"),
        ({"rows": [{"row": "a", "config": "none.yaml"}]}, "row 'a': .*none.yaml: cannot read this configuration"),
        ({"set": {"method.name": "cpss"}}, "row 'U-Net': key method.name: unknown method 'cpss'; did you mean 'cps'"),
        ({"set": {"schedul.rounds": 3}}, "row 'U-Net': set: unknown key schedul; did you mean 'schedule'"),
        ({"set": {"schedule": {"round": 3}}}, "set: unknown key schedule.round; did you mean 'rounds'"),
        ({"set": {"run.seed": 3}}, "set: key run.seed: a sweep sets it for each run, from its seeds"),
        ({"set": {"run": {"name": "x"}}}, "set: key run.name: a sweep sets it for each run, from its name and row"),
        ({"set": {"network.name": "timm_unet", "network.backbone": "x"}}, "key network.backbone is 'x': .*timm"),
        ({"set": {"network.name": "unnet"}}, "key network.name: unknown network 'unnet'; did you mean 'unet'"),
        ({"set": {"method.wait": 1}}, "method supervised has no option 'wait'"),
        ({"shares": ["1/3"]}, "row 'CPS': share 1/3 is not one of .*labelled.shares of the recipe"),
        ({"shares": ["0"]}, "key shares.0 is '0'"),
        ({"rows": [{"row": "a b", "config": "cps.yaml"}, {"row": "a  b", "config": "cps.yaml"}]}, "two runs are a  b"),
        ({"shares": ["1/2", "50%"]}, "two runs are CPS 1/2 seed 0, .*a share or a seed stands twice"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(configs: Path, keys: dict[str, Any], words: str) -> None:
    sweep = write(configs, **keys)
    with pytest.raises(InputError, match=words) as caught:
        load_sweep(sweep)
    assert str(sweep) in str(caught.value)


def test_rows_win_over_the_sweep_and_the_command_line_over_both(configs: Path) -> None:
    rows = [{"row": "a", "config": "cps.yaml", "set": {"schedule.rounds": 5}, "seeds": [3, 4]}]
    sweep = write(configs, set={"schedule.rounds": 9, "optimizer.lr": 0.5}, rows=rows)
    first = load_sweep(sweep).runs[0].config
    assert (first.schedule.rounds, first.optimizer.lr, first.run.seed) == (5, 0.5, 3)
    assert first.tracking.tags == {"sweep": "table", "row": "a"}
    assert load_sweep(sweep, ["schedule.rounds=7"]).runs[0].config.schedule.rounds == 7
    assert len(load_sweep(sweep).runs) == 4


def test_a_row_can_be_some_times_as_long_as_all_that_says(configs: Path) -> None:
    rows = [{"row": "a", "config": "cps.yaml"}, {"row": "b", "config": "cps.yaml", "times": 11}]

    def lengths(keys: dict[str, Any], *overrides: str) -> list[tuple[int | None, int, int | None]]:
        runs = load_sweep(write(configs, rows=rows, shares=["1/4"], set=keys), overrides).runs
        return [(s.rounds, s.epochs, s.warmup_epochs) for s in (run.config.schedule for run in runs)]

    assert lengths({"schedule.rounds": 9}) == [(9, 100, None), (99, 100, None)]
    assert lengths({"schedule.rounds": 9}, "schedule.rounds=7") == [(7, 100, None), (77, 100, None)]
    epochs = {"schedule.rounds": None, "schedule.epochs": 20}
    assert lengths(epochs) == [(None, 20, None), (None, 220, None)]
    assert lengths(epochs | {"schedule.warmup_epochs": 2}) == [(None, 20, 2), (None, 220, 22)]


def test_the_first_seeds_table_is_whole_before_the_next_begins(configs: Path) -> None:
    rows = [
        {"row": "U-Net", "config": "supervised.yaml", "shares": [1], "seeds": [7, 0]},
        {"row": "CPS", "config": "cps.yaml"},
    ]
    runs = load_sweep(write(configs, rows=rows, seeds=[0, 7])).runs
    found = [(run.config.run.seed, run.row, str(run.config.data.labelled_share)) for run in runs]
    one = [("U-Net", "1"), ("CPS", "1/4"), ("CPS", "1/2")]
    assert found == [(seed, *cell) for seed in (7, 0) for cell in one]


def test_a_part_of_a_sweep(configs: Path) -> None:
    sweep = write(configs, seeds=[0, 1])
    lines = dry_run(sweep, "--row", "CPS", "--share", "50%", "--share", "1/4", "--seed", "1")
    assert [line.split(":")[0] for line in lines] == ["[1/2] CPS 1/4 seed 1", "[2/2] CPS 1/2 seed 1"]
    whole = load_sweep(sweep)
    part = choose(whole, seeds=[1])
    assert part.runs == whole.runs, "its parent in MLflow is that of the whole"
    assert {run.config.run.seed for run in part.chosen} == {1}
    assert choose(whole).chosen == whole.runs
    for keys, words in (
        ({"rows": ["CSP"]}, "--row CSP: .*table.yaml has U-Net, CPS"),
        ({"shares": ["1/3"]}, "--share 1/3: .*table.yaml has 1, 1/4, 1/2"),
        ({"seeds": [2]}, "--seed 2: .*table.yaml has 0, 1"),
        ({"rows": ["U-Net"], "shares": ["1/4"]}, "no run is of all of --row, --share and --seed"),
    ):
        with pytest.raises(InputError, match=words):
            choose(whole, **keys)


def test_rows_that_the_command_line_makes_one_are_run_once(configs: Path) -> None:
    """Or a table shows a run twice, once under a name that says what it is not."""
    rows = [
        {"row": "CPS", "config": "cps.yaml"},
        {"row": "weights", "config": "cps.yaml", "set": {"method.class_balance": 0.5}},
        {"row": "light", "config": "cps.yaml", "set": {"method.weight": 1.0}},
        {"row": "again", "config": "cps.yaml"},
        {"row": "longer", "config": "cps.yaml", "times": 2},
    ]
    sweep = write(configs, rows=rows, seeds=[0, 1])
    assert len(dry_run(sweep)) == 20, "what is twice in the file is meant so"
    default = [
        {"row": "CPS", "config": "cps.yaml"},
        {"row": "1.5", "config": "cps.yaml", "set": {"method.weight": 1.5}},
    ]
    sweep = write(configs, rows=default)
    assert len(dry_run(sweep, "schedule.rounds=4")) == 4, "a value that is the default has a row of its own"
    sweep = write(configs, rows=rows, seeds=[0, 1])
    lines = dry_run(sweep, "method.class_balance=0.5")
    assert lines[0] == "row 'weights' is left out: with these settings it is the same as 'CPS'"
    assert [line.split(" ")[1] for line in lines[1:5]] == ["CPS", "CPS", "light", "light"]
    assert len(lines) == 1 + 16
    lines = dry_run(sweep, "method.weight=1", "method.class_balance=0.5")
    assert [line.split("'")[1] for line in lines[:2]] == ["weights", "light"]
    assert len(lines) == 2 + 12
    whole = load_sweep(sweep, ["method.class_balance=0.5"])
    assert [run.row for run in choose(whole, rows=["CPS"]).chosen] == ["CPS"] * 4
    with pytest.raises(InputError, match=r"--row weights: with the settings .* it is the same as 'CPS'"):
        choose(whole, rows=["weights"])


def test_settings_of_a_sweep_are_read_as_those_of_a_config(configs: Path) -> None:
    rows = [{"row": "Größe 1", "config": "cps.yaml", "set": {"method": {"weight": "VALUE"}}}]
    sweep = write(configs, set={"tracking.tags": {"mine": "1"}, "run.experiment": "DAY"}, rows=rows)
    sweep.write_text(sweep.read_text().replace("VALUE", "1e-1").replace("DAY", "2026-11-26"))  # neither is text in YAML
    run = load_sweep(sweep).runs[0]
    assert run.config.method.options["weight"] == 0.1
    assert run.config.tracking.tags == {"mine": "1", "sweep": "table", "row": "Größe 1"}
    assert run.folder == configs / "runs" / "2026-11-26" / "table-größe-1-1_4-s0"
    assert resolve(load_config(run.file, run.overrides)) == run.config, "the trainer reads something else"


@pytest.mark.parametrize("override", ["run.seed=3", "run.name=x", "data={labelled_share: 1}"])
def test_what_the_sweep_sets_itself_is_no_override(configs: Path, override: str) -> None:
    with pytest.raises(InputError, match=r"command line: key .*: a sweep sets it for each run"):
        load_sweep(write(configs), [override])


def test_bad_input_is_one_message(configs: Path) -> None:
    done = run("dctc", "sweep", configs / "none.yaml", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("none.yaml: cannot read this sweep (No such file or directory)")
    sweep = write(configs)
    done = run("dctc", "sweep", sweep, "--jobs", 2, "--launch", "launch/ddp.yaml", check=False)
    assert done.returncode == 2
    assert "--launch and --jobs exclude each other" in done.stderr
