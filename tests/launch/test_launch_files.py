"""Every file of launch/ is read by accelerate itself, and starts the processes that it promises."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(path.name for path in LAUNCH.glob("*.yaml"))

# Keys that say how processes start. Everything else (precision, accumulation, clipping ...) belongs to configs/.
PROCESS_KEYS = {
    "compute_environment", "deepspeed_config", "distributed_type", "fsdp_config", "gpu_ids", "machine_rank",
    "main_process_ip", "main_process_port", "num_machines", "num_processes", "rdzv_backend", "same_network",
}  # fmt: skip

RANKS = """
import os
import torch
from accelerate import Accelerator

accelerator = Accelerator()
state = accelerator.state
total = accelerator.reduce(torch.tensor([10.0 ** state.process_index])).item()
line = f"rank {state.process_index} of {state.num_processes} on {state.device.type}, {state.backend}, sum {total:g}"
print(line, flush=True)
accelerator.end_training()
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A script whose processes say who they are, and add up one digit each."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    return script


def start(scripts: Path, script: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    command = [str(scripts / "accelerate"), "launch", *arguments, str(script)]
    return subprocess.Popen(
        command, env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return sorted(re.findall(r"rank .*?, sum [0-9]+", out))


def test_there_are_launch_files() -> None:
    assert {"single.yaml", "cpu_pair.yaml", "ddp.yaml", "multi_node.yaml"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it_and_it_has_no_hyper_parameters(name: str) -> None:
    load_config_from_file(str(LAUNCH / name))
    assert set(yaml.safe_load((LAUNCH / name).read_text())) <= PROCESS_KEYS


def test_single_starts_one_process(scripts: Path, ranks: Path) -> None:
    process = start(scripts, ranks, "--config_file", str(LAUNCH / "single.yaml"), ACCELERATE_USE_CPU="true")
    assert said(process) == ["rank 0 of 1 on cpu, None, sum 1"]


def test_cpu_pair_starts_two_processes_that_reduce_together(scripts: Path, ranks: Path) -> None:
    process = start(scripts, ranks, "--config_file", str(LAUNCH / "cpu_pair.yaml"), ACCELERATE_USE_CPU="true")
    assert said(process) == ["rank 0 of 2 on cpu, gloo, sum 11", "rank 1 of 2 on cpu, gloo, sum 11"]


def test_ddp_starts_as_many_as_are_asked_for(scripts: Path, ranks: Path) -> None:
    arguments = ["--config_file", str(LAUNCH / "ddp.yaml"), "--num_processes", "3"]
    process = start(scripts, ranks, *arguments, ACCELERATE_USE_CPU="true")
    assert said(process) == [f"rank {rank} of 3 on cpu, gloo, sum 111" for rank in range(3)]


def test_ddp_without_a_number_of_processes_is_an_error(scripts: Path, ranks: Path) -> None:
    process = start(scripts, ranks, "--config_file", str(LAUNCH / "ddp.yaml"), ACCELERATE_USE_CPU="true")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--num_processes" in errors


def test_multi_node_joins_two_launchers(scripts: Path, ranks: Path) -> None:
    """Two launchers on this machine stand for two machines; what they share is the address alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ["--config_file", str(LAUNCH / "multi_node.yaml"), "--num_machines", "2", "--num_processes", "2"]
    arguments += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    machines = [start(scripts, ranks, *arguments, rank, ACCELERATE_USE_CPU="true") for rank in "01"]
    try:
        assert [said(machine) for machine in machines] == [
            [f"rank {rank} of 2 on cpu, gloo, sum 11"] for rank in range(2)
        ]
    finally:
        for machine in machines:
            machine.kill()


def commands(text: str) -> list[list[str]]:
    """The words of every ``accelerate launch`` command in a text, without variables before it and comment marks."""
    lines = re.sub(r"\\\n#? *", "", text)
    found = re.findall(r"accelerate (launch [^`\n]*?dctc/train\.py)", lines)
    return [shlex.split(command)[1:] for command in found]


@pytest.mark.parametrize("name", [*FILES, "README.md", "../README.md", "../Makefile"])
def test_every_command_shown_is_one_that_accelerate_takes(name: str) -> None:
    parser = launch_command_parser()
    shown = commands((LAUNCH / name).read_text())
    assert shown
    for words in shown:
        arguments = parser.parse_args(words)
        assert arguments.training_script == "dctc/train.py"
        assert arguments.config_file is None or (LAUNCH.parent / arguments.config_file).is_file()


def test_the_table_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    files = [str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {"torchrun.sh", "slurm.sbatch", "kubernetes/trainjob.yaml"} <= set(files)
    assert [name for name in files if f"`{name}`" not in text and name != "README.md"] == []
