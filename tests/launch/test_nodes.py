"""Two machines, as far as one can play them: namespaces of network, processes and host name, joined by a cable.

Processes of one reach those of the other over that cable alone, and cannot see whether they live. They share the file
system, as real machines share the folders of datasets and runs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.tiny import ROOT, write_config
from tests.weights import assert_same_weights, complete_checkpoints, folder_of

ROUNDS = {"rounds": 12}


def ip(*words: str, check: bool = True) -> str:
    """Run ``ip``; returns what it prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0 or not check, f"ip {words}: {done.stderr}"
    return done.stdout


# What a command of a machine runs in: its own process numbers, host name and /etc/hosts.
INSIDE = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class Node:
    """One of the two machines."""

    def __init__(self, name: str, cable: str, address: str, hosts: Path, scripts: Path) -> None:
        self.name, self.cable, self.address = name, cable, address
        self.hosts, self.scripts = hosts, scripts

    def start(self, command: Sequence[object], **variables: str) -> subprocess.Popen[str]:
        """Start a command of the environment here."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PET_", "SLURM_"))}
        environment = mine | {
            "PATH": f"{self.scripts}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": self.cable,
            "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        } | variables  # fmt: skip
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-euc", INSIDE, "sh"]
        words = ["ip", "netns", "exec", self.name, *apart, self.name, str(self.hosts), *map(str, command)]
        return subprocess.Popen(
            words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill(self) -> int:
        """SIGKILL to all that runs here, as by a power cut that the other side still hears of; returns how many."""
        killed = 0
        while pids := ip("netns", "pids", self.name, check=False).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
                    killed += 1
            time.sleep(0.05)
        return killed


@pytest.fixture
def nodes(scripts: Path, tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two machines of 10.77.x.0/24; gone afterwards, with all that runs on them."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("making namespaces needs root, iproute2 and util-linux")
    probe = f"dctc-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=20, check=False)
    if made.returncode:
        pytest.skip(f"this system makes no network namespaces: {made.stderr.strip()}")
    ip("netns", "delete", probe)
    mark, net = secrets.token_hex(3), secrets.randbelow(255)
    names = [f"dctc-{mark}-{side}" for side in "ab"]
    cables = [f"veth{mark}{side}" for side in "ab"]
    addresses = [f"10.77.{net}.{host}" for host in (1, 2)]
    hosts = tmp_path / "hosts"
    lines = [f"{address} {name}" for address, name in zip(addresses, names, strict=True)]
    hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    first, second = (Node(*place, hosts, scripts) for place in zip(names, cables, addresses, strict=True))
    pair = (first, second)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for node in pair:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.cable)
            ip("-n", node.name, "link", "set", node.cable, "up")
            ip("-n", node.name, "link", "set", "lo", "up")
        yield pair
    finally:
        for node in pair:
            node.kill()
            ip("netns", "delete", node.name, check=False)


def accelerate(pair: tuple[Node, Node], config: Path) -> list[subprocess.Popen[str]]:
    """The command of launch/README.md for several machines, on both."""
    shared = ["--config_file", "launch/multi_node.yaml", "--num_machines", 2, "--num_processes", 2]
    shared += ["--main_process_ip", pair[0].address, "--machine_rank"]
    return [
        node.start(["accelerate", "launch", *shared, rank, "dctc/train.py", config]) for rank, node in enumerate(pair)
    ]


def torchrun(pair: tuple[Node, Node], config: Path) -> list[subprocess.Popen[str]]:
    """The same with launch/torchrun.sh."""
    places = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": pair[0].address, "TMPDIR": str(config.parent)}
    return [node.start(["launch/torchrun.sh", config], **places, NODE_RANK=str(rank)) for rank, node in enumerate(pair)]


Start = Callable[[tuple[Node, Node], Path], list[subprocess.Popen[str]]]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output


def wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.matrix
def test_two_machines_train_as_two_processes_of_one(
    nodes: tuple[Node, Node], tmp_path: Path, tiny_dataset: Path, uninterrupted: Path
) -> None:
    config = write_config(tmp_path / "apart.yaml", tiny_dataset, schedule=ROUNDS)
    finish(accelerate(nodes, config))
    assert_same_weights(folder_of(config), uninterrupted)


@pytest.mark.matrix
@pytest.mark.parametrize(("start", "lost"), [(accelerate, 1), (torchrun, 0)], ids=["accelerate", "torchrun"])
def test_when_one_machine_is_lost_the_other_ends_and_both_go_on_later(
    start: Start, lost: int, nodes: tuple[Node, Node], tmp_path: Path, tiny_dataset: Path, uninterrupted: Path
) -> None:
    """Node 0 has the meeting point and rank 0, node 1 neither: each is lost once."""
    config = write_config(tmp_path / "lost.yaml", tiny_dataset, schedule=ROUNDS)
    folder = folder_of(config)
    processes = start(nodes, config)
    wait_for(folder / "checkpoints" / "step-00000003", processes)
    assert nodes[lost].kill() >= 2, "a launcher and its rank"
    begin = time.monotonic()
    output, _ = processes[1 - lost].communicate(timeout=60)
    print(f"the other one ended after {time.monotonic() - begin:.1f} s:", re.findall("^error.*$", output, re.MULTILINE))
    assert processes[1 - lost].returncode not in (0, 75), output
    if lost == 1:  # rank 0 is there, and with it the meeting point over which signs of life are exchanged
        assert re.search(rf"error: rank 0: rank 1 \(process \d+ on {nodes[1].name}\)", output), output
    processes[lost].communicate(timeout=10)
    saved = complete_checkpoints(folder)
    assert (folder / "checkpoints" / "latest").read_text() in saved
    assert not (folder / "model.safetensors").exists(), "it was lost too late"
    finish(start(nodes, config))
    assert_same_weights(folder, uninterrupted)


@pytest.mark.matrix
def test_when_the_cable_is_pulled_both_machines_end_within_a_minute(
    nodes: tuple[Node, Node], tmp_path: Path, tiny_dataset: Path
) -> None:
    """No connection is closed: only the silence tells, and the side without the meeting point hears nothing at all."""
    config = write_config(tmp_path / "pulled.yaml", tiny_dataset, schedule={"rounds": 100_000})
    processes = accelerate(nodes, config)
    wait_for(folder_of(config) / "checkpoints" / "step-00000003", processes)
    ip("-n", nodes[0].name, "link", "set", nodes[0].cable, "down")
    begin = time.monotonic()
    said = []
    for process in processes:
        output, _ = process.communicate(timeout=max(1.0, 75 - (time.monotonic() - begin)))
        print(f"ended after {time.monotonic() - begin:.1f} s:", re.findall("^error.*$", output, re.MULTILINE))
        assert process.returncode not in (0, 75), output
        said.append(output)
    assert re.search(rf"error: rank 1 \(process \d+ on {nodes[1].name}\) gives no sign of life", said[0]), said[0]
    assert re.search(rf"error: the store of the rendezvous, on {nodes[0].address}, does not answer", said[1]), said[1]
