"""A tiny real dataset and runs on it, through the commands that users type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent


def make_dataset(folder: Path, scenes: int = 8, size: int = 96, tile: int = 32) -> Path:
    """Synthetic towns, packed: about 9 tiles of 32 px a scene, 6 classes, train, val and test."""
    run("dctc", "synth", folder / "scenes", "--scenes", scenes, "--size", size)
    recipe = ROOT / "configs" / "data" / "synthetic.yaml"
    dataset = folder / "dataset"
    run("dctc", "shard", recipe, dataset, "--root", folder / "scenes", "--workers", 1, f"tile.size={tile}")
    return dataset


def write_config(path: Path, dataset: Path, method: str = "dctc", **sections: dict[str, Any]) -> Path:
    """A run of a few rounds with a tiny network in float32 and group norm."""
    config: dict[str, Any] = {
        "data": {"dataset": str(dataset), "labelled_share": "1/2"},
        "network": {"width": 4, "norm": "group"},
        "method": {"name": method},
        "schedule": {"rounds": 6},
        "run": {"output": str(path.parent / "runs"), "name": path.stem, "log_every": 1, "checkpoint_every": 1},
        "tracking": {"enabled": False},
        "evaluation": {"every": 0, "test": False},
    }
    config["run"]["pictures_every"] = 0
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    path.write_text(yaml.safe_dump(config))
    return path


def run(
    command: str, *arguments: object, check: bool = True, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment from the repository's root."""
    words, variables = list(map(str, arguments)), {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if forked.suits(command, variables):
        done = forked.run(command, words, ROOT, variables, timeout)
    else:
        done = subprocess.run(
            [str(SCRIPTS / command), *words], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{command} {arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def launch_arguments(processes: int) -> list[str]:
    """``launch --config_file ... dctc/train.py`` for 1 or 2 real processes on the CPU."""
    file = ROOT / "launch" / ("cpu_pair.yaml" if processes == 2 else "single.yaml")
    return ["launch", "--config_file", str(file), "dctc/train.py"]


def launch(processes: int, config: Path, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` on the CPU with 1 or 2 real processes."""
    return run("accelerate", *launch_arguments(processes), config, *overrides, check=check, ACCELERATE_USE_CPU="true")


def launch_together(strategy: str, config: Path, runs: Sequence[str]) -> None:
    """Train several runs, each ``config`` with the overrides of one string, in one start of processes.

    Two processes, but for the strategy ``none``. See ``tests/distributed/matrix.py``.
    """
    file = {"none": "single", "ddp": "cpu_pair"}.get(strategy, strategy)
    processes = [] if strategy == "none" else ["--num_processes", "2"]
    run(
        "accelerate", "launch", "--config_file", ROOT / "launch" / f"{file}.yaml", *processes,
        "tests/distributed/matrix.py", config, *runs, timeout=1500, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT),
    )  # fmt: skip


def start(command: Sequence[object], until: Path) -> subprocess.Popen[bytes]:
    """Start a command of this environment and wait until ``until`` exists; fails when it has ended by then."""
    process = subprocess.Popen(
        [str(SCRIPTS / str(command[0])), *map(str, command[1:])],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not until.exists():
        assert process.poll() is None, f"{command[0]} ended with {process.returncode} before {until} appeared"
        assert time.monotonic() < deadline, f"{until} did not appear"
        time.sleep(0.002)
    assert process.poll() is None, "it ended too early"
    return process


def interrupt(command: Sequence[object], signal_number: int, until: Path) -> int:
    """Start a command of this environment, send it and all its processes a signal once ``until`` exists.

    Returns its exit status; fails when it ended before the signal. A launcher's ranks have sessions of their own, and
    those of one that was killed alone would train on beside whoever starts the run again.
    """
    process = start(command, until)
    others = psutil.Process(process.pid).children(recursive=True)
    for member in (psutil.Process(process.pid), *others):
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal_number)
    status = process.wait(timeout=60)
    assert not psutil.wait_procs(others, timeout=60)[1], "processes of the command outlived it"
    return status


def command_line(process: psutil.Process) -> str:
    """The words it was started with; empty for one that has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def losses(folder: Path) -> list[dict[str, float]]:
    """The training losses of each logged round of a run's folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line["values"].items() if k.startswith("train/loss/")} for line in lines]
    return [step for step in steps if step]
