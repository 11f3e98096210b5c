"""launch/slurm.sbatch with stand-ins for SLURM's commands: two "nodes" on this machine, signals and requeueing.

What the stand-ins do is what the real ones are documented to do: srun starts one task a node, hands SIGUSR1 on to all
processes of the step, kills the step at SIGTERM and ends with the highest code of its tasks.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import ROOT, command_line, write_config
from tests.weights import assert_same_weights, complete_checkpoints, folder_of

SCRIPT = ROOT / "launch" / "slurm.sbatch"

SRUN = """#!{python}
import contextlib, os, signal, subprocess, sys, time
import psutil

words = sys.argv[1:]
options = dict(word.lstrip("-").split("=", 1) for word in words if word.startswith("--"))
command = words[len(options):]
assert options["ntasks-per-node"] == "1", options
assert int(options["ntasks"]) == int(os.environ["SLURM_JOB_NUM_NODES"]), options
tasks = []

def send(number):
    for task in tasks:
        if task.poll() is None:
            for process in [psutil.Process(task.pid), *psutil.Process(task.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

signal.signal(signal.SIGUSR1, lambda number, _: send(number))
signal.signal(signal.SIGTERM, lambda number, _: send(signal.SIGKILL))
for node in range(int(options["ntasks"])):
    places = {{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}}
    tasks.append(subprocess.Popen(command, env={{**os.environ, **places}}, start_new_session=True))
codes = [code if code >= 0 else 128 - code for code in (task.wait() for task in tasks)]
print("srun: codes", codes, flush=True)
sys.exit(max(codes))
"""

SCONTROL = """#!/bin/sh
echo "$@" >> "{log}"
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; echo second.invalid; fi
"""


class Cluster:
    """A batch system of two nodes and one job, in a folder."""

    def __init__(self, folder: Path, scripts: Path) -> None:
        self.folder = folder
        self.log = folder / "scontrol.log"
        self.log.touch()
        self.restarts = 0
        commands = folder / "bin"
        commands.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (commands / name).write_text(text.format(python=sys.executable, log=self.log))
            (commands / name).chmod(0o755)
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PET_", "SLURM_"))}
        self.environment = mine | {
            "PATH": f"{commands}:{scripts}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": str(free_job()), "TMPDIR": str(folder),
            "ACCELERATE_USE_CPU": "true", "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        """Run the job's script, as SLURM does from a copy in its spool folder."""
        spooled = self.folder / "slurm_script"
        spooled.write_bytes(SCRIPT.read_bytes())
        environment = self.environment | variables
        if self.restarts:
            environment["SLURM_RESTART_COUNT"] = str(self.restarts)
        self.restarts += 1
        return subprocess.Popen(
            ["bash", spooled, *map(str, arguments)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=self.folder,
        )  # fmt: skip

    @property
    def requeued(self) -> int:
        """How often this job was put back into the queue, and nothing else."""
        lines = [line for line in self.log.read_text().splitlines() if not line.startswith("show hostnames")]
        assert set(lines) <= {f"requeue {self.environment['SLURM_JOB_ID']}"}
        return len(lines)


def free_job() -> int:
    """A job id whose port is free, and that of its first restart too."""
    while True:
        job = random.randrange(10_000, 100_000)
        try:
            for restart in range(3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 20_000 + (job + 101 * restart) % 10_000))
        except OSError:
            continue
        return job


@pytest.fixture
def cluster(tmp_path: Path, scripts: Path) -> Cluster:
    folder = tmp_path / "cluster"
    folder.mkdir()
    return Cluster(folder, scripts)


@pytest.mark.matrix
@pytest.mark.slow
def test_told_that_its_time_is_up_it_saves_is_requeued_and_goes_on(
    cluster: Cluster, tmp_path: Path, tiny_dataset: Path, uninterrupted: Path
) -> None:
    config = write_config(tmp_path / "job.yaml", tiny_dataset, schedule={"rounds": 12}, run={"checkpoint_every": 0})
    job = cluster.start(config)
    deadline = time.monotonic() + 120
    while not (folder_of(config) / "metrics.jsonl").exists():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for _ in range(4):  # impatient
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output
    assert "srun: codes [75, 75]" in output
    assert len(complete_checkpoints(folder_of(config))) == 1
    assert not (folder_of(config) / "model.safetensors").exists()
    assert cluster.requeued == 1
    again = cluster.start(config)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert cluster.requeued == 1
    assert_same_weights(folder_of(config), uninterrupted)


@pytest.mark.slow
def test_bad_arguments_are_not_tried_again(cluster: Cluster, tmp_path: Path, tiny_dataset: Path) -> None:
    config = write_config(tmp_path / "wrong.yaml", tiny_dataset)
    job = cluster.start(config, "optimizer.lr=fast")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2, output
    assert "optimizer.lr" in output
    assert cluster.requeued == 0


def launcher(cluster: Cluster, text: str) -> None:
    """Let the job start this instead of torchrun.sh."""
    (cluster.folder / "launch").mkdir(exist_ok=True)
    script = cluster.folder / "launch" / "torchrun.sh"
    script.write_text(f"#!/usr/bin/env bash\n{text}\n")
    script.chmod(0o755)


def test_a_failure_is_tried_again_as_often_as_is_said(cluster: Cluster) -> None:
    # A node was lost: its launcher was killed, and that of the other failed.
    launcher(cluster, "exit $(( SLURM_NODEID ? 137 : 1 ))")
    ends = []
    for _ in range(4):
        job = cluster.start("any.yaml", SLURM_SUBMIT_DIR=str(cluster.folder), DCTC_REQUEUES="2")
        job.communicate(timeout=60)
        ends.append((job.returncode, cluster.requeued))
    assert ends == [(137, 1), (137, 2), (137, 2), (137, 2)]


@pytest.mark.parametrize(("told", "requeued"), [("USR1", 1), ("TERM", 0)])
def test_who_cancels_a_job_does_not_get_it_back(cluster: Cluster, told: str, requeued: int) -> None:
    """scancel sends SIGTERM to the launchers and the batch shell; all save and end with 75, as at SIGUSR1."""
    launcher(
        cluster, 'trap "exit 75" USR1 TERM; touch "up$SLURM_NODEID"; echo $$; for _ in {1..300}; do sleep 0.1; done'
    )
    job = cluster.start("any.yaml", SLURM_SUBMIT_DIR=str(cluster.folder))
    deadline = time.monotonic() + 30
    while len(list(cluster.folder.glob("up?"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(getattr(signal, f"SIG{told}"))
    if told == "TERM":
        for process in psutil.Process(job.pid).children(recursive=True):
            line = command_line(process)
            if "torchrun.sh" in line and "srun" not in line:
                process.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 75, output
    assert cluster.requeued == requeued


def test_the_options_are_ones_that_sbatch_has() -> None:
    """As sbatch's manual names them; the signal goes to the batch shell alone, long enough before the end."""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))
    assert set(options) == {"job-name", "ntasks-per-node", "requeue", "open-mode", "output", "signal"}
    assert options["open-mode"] == "append"
    signals = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert signals
    wait = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", (ROOT / "launch" / "torchrun.sh").read_text())
    assert wait
    assert int(signals[1]) > int(wait[1]), "the ranks must be gone before SLURM kills the job"
