"""launch/env.sh and launch/torchrun.sh: which variables they set, and the exit codes that arrive."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import command_line, write_config
from tests.weights import assert_same_weights, complete_checkpoints, folder_of

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPT = LAUNCH / "torchrun.sh"


def environment(scripts: Path, **variables: str) -> dict[str, str]:
    """As in an activated environment, with nothing of a launcher in it."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PET_", "SLURM_", "TORCH"))}
    return mine | {"PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | variables


def sourced(**variables: str) -> dict[str, str]:
    """The environment after sourcing env.sh with nothing but ``variables`` set."""
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "-euc", f". {LAUNCH / 'env.sh'}; env -0"],
        env={"PATH": os.environ["PATH"]} | variables, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def test_what_the_user_has_set_stays() -> None:
    before = sourced()
    names = set(before) - {"PATH", "PWD", "SHLVL", "_"}
    assert {"TORCH_FR_BUFFER_SIZE", "NCCL_DEBUG", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF"} <= names
    kept = dict.fromkeys(names, "mine") | {"NCCL_DEBUG": ""}
    after = sourced(**kept)
    assert {name: after[name] for name in names} == kept


def test_each_process_gets_its_share_of_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert sourced()["OMP_NUM_THREADS"] == str(cores)
    assert sourced(NPROC_PER_NODE=str(cores))["OMP_NUM_THREADS"] == "1"
    assert sourced(NPROC_PER_NODE=str(2 * cores))["OMP_NUM_THREADS"] == "1"


def test_every_variable_is_read_by_the_libraries_that_are_installed() -> None:
    """By name: in torch's libraries and headers (those of NCCL come with the CPU wheel too), Python or OpenMP."""
    import torch

    folder = Path(torch.__file__).parent
    readers = [*(folder / "lib").glob("*.so*"), *folder.glob("include/**/*.hpp"), *folder.glob("include/**/*.h")]
    # NCCL itself and PYTHON* are not in torch's wheel for the CPU.
    names = set(sourced()) - {"PATH", "PWD", "SHLVL", "_", "PYTHONFAULTHANDLER", "PYTHONUNBUFFERED"}
    missing = {name.encode() for name in names}
    for file in readers:
        content = file.read_bytes()
        missing -= {name for name in missing if name in content}
    assert missing == set()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "usage: launch/torchrun.sh CONFIG"),
        (["any.yaml"], {"NNODES": "2", "NPROC_PER_NODE": "1"}, "set NODE_RANK"),
        (["any.yaml"], {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": "0"}, "set MASTER_ADDR"),
        (["any.yaml"], {"PET_NNODES": "2", "NPROC_PER_NODE": "1", "PET_NODE_RANK": "1"}, "set MASTER_ADDR"),
        (["any.yaml"], {"CUDA_VISIBLE_DEVICES": ""}, "no GPU is visible here: set NPROC_PER_NODE"),
    ],
)
def test_what_is_missing_is_said(scripts: Path, arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [SCRIPT, *arguments], env=environment(scripts, **variables), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr


def start(scripts: Path, config: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    variables = {"ACCELERATE_USE_CPU": "true", "NPROC_PER_NODE": "2"} | variables
    return subprocess.Popen(
        [SCRIPT, config, *overrides], env=environment(scripts, **variables), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path} appeared"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGUSR1, marks=pytest.mark.matrix), signal.SIGINT], ids=lambda number: number.name
)
def test_asked_to_stop_it_ends_with_75_and_goes_on(
    number: signal.Signals, scripts: Path, tmp_path: Path, tiny_dataset: Path, uninterrupted: Path
) -> None:
    config = write_config(tmp_path / "stopped.yaml", tiny_dataset, schedule={"rounds": 12}, run={"checkpoint_every": 0})
    process = start(scripts, config, TMPDIR=str(tmp_path))
    wait_for(folder_of(config) / "metrics.jsonl", process)
    os.killpg(process.pid, number)  # as a terminal sends Ctrl-C
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert len(complete_checkpoints(folder_of(config))) == 1
    assert list(tmp_path.glob("dctc-exit.*")) == [], "nothing stays in the folder for temporary files"
    if number == signal.SIGUSR1:
        again = start(scripts, config, TMPDIR=str(tmp_path))
        output, _ = again.communicate(timeout=120)
        assert again.returncode == 0, output
        assert_same_weights(folder_of(config), uninterrupted)


@pytest.mark.slow
def test_bad_arguments_keep_their_code_and_a_killed_rank_is_a_failure(
    scripts: Path, tmp_path: Path, tiny_dataset: Path
) -> None:
    config = write_config(tmp_path / "failing.yaml", tiny_dataset, schedule={"rounds": 200})
    wrong = start(scripts, config, "optimizer.lr=fast", TMPDIR=str(tmp_path))
    output, _ = wrong.communicate(timeout=120)
    assert wrong.returncode == 2
    assert "optimizer.lr" in output
    process = start(scripts, config, TMPDIR=str(tmp_path))
    wait_for(folder_of(config) / "metrics.jsonl", process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "rank.py" in command_line(p)]
    workers = [rank for rank in ranks if "torch.distributed.run" not in rank.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output


@pytest.mark.slow
def test_when_the_script_is_killed_the_ranks_save_and_end(scripts: Path, tmp_path: Path, tiny_dataset: Path) -> None:
    assert shutil.which("setpriv"), "part of util-linux, which every Linux with a shell has"
    config = write_config(tmp_path / "left.yaml", tiny_dataset, schedule={"rounds": 200}, run={"checkpoint_every": 0})
    process = start(scripts, config, TMPDIR=str(tmp_path))
    wait_for(folder_of(config) / "metrics.jsonl", process)
    others = psutil.Process(process.pid).children(recursive=True)
    assert len(others) >= 3, "torchrun and two ranks"
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs(others, timeout=60)[1] == []
    assert len(complete_checkpoints(folder_of(config))) == 1


@pytest.mark.slow
def test_asked_to_stop_before_anything_began_there_is_nothing_to_lose(
    scripts: Path, tmp_path: Path, tiny_dataset: Path
) -> None:
    config = write_config(tmp_path / "early.yaml", tiny_dataset)
    process = start(scripts, config, TMPDIR=str(tmp_path))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("dctc-exit.*/0")):  # rank 0 is there, and imports torch
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert not folder_of(config).exists()


def test_every_variable_that_the_scripts_offer_is_used_in_them() -> None:
    for name in ("torchrun.sh", "slurm.sbatch"):
        text = (LAUNCH / name).read_text()
        head, body = text.split("set -euo pipefail", 1)
        offered = re.findall(r"^#   ([A-Z_]+(?:, [A-Z_]+)*)  ", head, re.MULTILINE)
        used = body + (LAUNCH / "torchrun.sh").read_text().split("set -euo pipefail", 1)[1]
        assert offered
        assert [v for line in offered for v in line.split(", ") if v not in used] == []
