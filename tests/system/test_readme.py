"""The README's commands are run as they stand there, section by section and in their order, on less data.

Every line of a ``bash`` block falls under one rule of :data:`RULES`: it is run with the changes that make it small, or
it is what another test or CI itself runs. A line that no rule knows fails, so nothing gets into the README untried.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import from_origin

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("Makefile", "README.md", "configs", "constraints.txt", "dctc", "launch", "pyproject.toml", "shards")
TILE = 64
SMALL_RUN = (
    "network.width=4 schedule.rounds=2 precision.dtype=fp32 data.batch_labelled=2 data.batch_unlabelled=2 "
    "evaluation.batch=2"
)
SMALL_DEMO = f"DEMO_SCENES=12 DEMO_SIZE=128 DEMO_ROUNDS=2 DEMO_KEYS='{SMALL_RUN}' DEMO_SHARD_KEYS='tile.size={TILE}'"


def blocks(text: str) -> list[str]:
    """The ``bash`` blocks of a Markdown text, also indented ones."""
    found = re.findall(r"^( *)```bash\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(text: str) -> list[str]:
    """The commands of all ``bash`` blocks, continued lines joined, comments gone."""
    lines = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^| +)#.*", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def sections(text: str) -> dict[str, list[str]]:
    """The commands of each ``##`` section that has any; what stands before the first one is the "start"."""
    start, *parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    named = {"start": start} | dict(zip(parts[::2], parts[1::2], strict=True))
    return {heading: found for heading, body in named.items() if (found := commands(body))}


SECTIONS = sections((ROOT / "README.md").read_text())
QUICK = {"Install by hand", "Your own scenes in five steps"}  # the others take minutes: make test-matrix


def run(command: str, work: Path) -> str:
    """Run a line in bash as a user would, in the copy; returns what it printed."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": paths, "PYTHONPATH": str(work), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=work, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def smaller(command: str, work: Path) -> str:
    """The same command on less data: a smaller size, tile, network; /data is a folder of the copy."""
    command = command.replace(" /data/", f" {work}/data/")
    if command.startswith("dctc synth"):
        return re.sub(r"--size \d+", "--size 128", command)
    if command.startswith("dctc shard"):
        return f"{command} tile.size={TILE}"
    if "dctc/train.py" in command:  # no GPUs here: two processes on the CPU take their place
        return f"{command} {SMALL_RUN}".replace("launch/ddp.yaml --num_processes 8", "launch/cpu_pair.yaml")
    return command


def run_smaller(command: str, work: Path) -> None:
    run(smaller(command, work), work)


def run_demo(command: str, work: Path) -> None:
    """In the environment that runs the tests: making one is what ``make test`` does before every run of this suite."""
    (work / ".venv").symlink_to(sys.prefix)
    made = "-o .venv/made -o .venv/installed"
    printed = run(f"{command} {made} {SMALL_DEMO}", work)
    closing = printed[printed.index("mIoU") :]
    assert all(word in closing for word in ("student", "teacher", "supervised", "mlflow ui"))
    for path in re.findall(r"(?:map|pictures): +(\S+)", closing):
        assert (work / path.rstrip(",")).exists(), path
    reports = {path: path.stat().st_mtime_ns for path in work.glob("runs/demo/*/report.json")}
    assert len(reports) == 2
    run(f"{command} {made} {SMALL_DEMO}", work)
    assert {path: path.stat().st_mtime_ns for path in reports} == reports, "a second run trains again"


def check_is_ci(command: str, work: Path) -> None:
    """``make test`` is this very run; CI starts it so."""
    assert re.search(rf"^make .*\b{command.split()[1]}\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def check_is_in_makefile(command: str, work: Path) -> None:
    """The same installation as the Makefile's, which made the environment of this run."""
    makefile = re.sub(r"\$\(BIN\)/python -m pip install --quiet", "pip install", (work / "Makefile").read_text())
    assert command in makefile


def make_environment(command: str, work: Path) -> None:
    run(f"{command} --without-pip", work)
    run(". .venv/bin/activate", work)


def write_own_scenes(command: str, work: Path) -> None:
    """Copy the template and make scenes that fit it as it stands; two of them have no label."""
    run(command, work)
    town = work / "data" / "my_town"
    for folder in ("images", "labels"):
        (town / folder).mkdir(parents=True)
    classes = yaml.safe_load((work / command.split()[-1]).read_text())["classes"]
    colors = np.array([entry["color"] for entry in classes], np.uint8)
    for number in range(10):
        image, label = patches(colors, 2 * TILE, number)
        write_rgb(town / "images" / f"part{number}.tif", image)
        if number < 8:
            Image.fromarray(label).save(town / "labels" / f"part{number}.png")
    shutil.copy(town / "images" / "part0.tif", town / "new.tif")


def run_part_of_a_sweep(command: str, work: Path) -> None:
    """Two rows and one seed of it."""
    path = work / command.split()[2]
    sweep = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(sweep | {"rows": sweep["rows"][-2:], "seeds": [0]}))
    assert run(f"{command} {SMALL_RUN}", work).count("test mIoU") == 2


def open_mlflow(command: str, work: Path) -> None:
    """Start the server, see that it answers with the page, stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(Path(sys.executable).parent / "mlflow"), *command.split()[1:], "--port", str(port), "--workers", "1"],
        cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            assert server.poll() is None, "mlflow ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                    assert page.status == 200
                    return
            except OSError:
                assert time.monotonic() < deadline, "no answer from mlflow"
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(30)


RULES: list[tuple[str, Callable[[str, Path], None]]] = [
    (r"make demo", run_demo),
    (r"make (test|lint|types)", check_is_ci),
    (r"python3 -m venv \.venv", make_environment),
    (r"\. \.venv/bin/activate", lambda command, work: None),  # in the rule above
    (r"pip install -c constraints\.txt -e \S+", check_is_in_makefile),
    (r"cp configs/data/own_scenes\.yaml my_town\.yaml", write_own_scenes),
    (r"mlflow ui .*", open_mlflow),
    (r"dctc sweep .*", run_part_of_a_sweep),
    (r"(dctc|accelerate launch) .*", run_smaller),
]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """What a clone holds, in a temporary folder, with a small dataset in its owners' layout below ``data/``."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    write_potsdam(folder / "data" / "Potsdam")
    return folder


POTSDAM = [f"{r}_{c}" for r, columns in {2: range(10, 15), 3: range(10, 15), 4: range(10, 16), 5: range(10, 16),
           6: range(7, 16), 7: range(7, 14)}.items() for c in columns]  # fmt: skip
ISPRS = np.array([(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)], np.uint8)


def write_potsdam(folder: Path, size: int = TILE) -> None:
    """All 38 scenes of Potsdam, each as small as a tile, in the folders and under the names that they come with."""
    assert len(POTSDAM) == 38
    for parent in ("2_Ortho_RGB", "5_Labels_all"):
        (folder / parent).mkdir(parents=True)
    for number, scene in enumerate(POTSDAM):
        image, label = patches(ISPRS, size, number)
        write_rgb(folder / "2_Ortho_RGB" / f"top_potsdam_{scene}_RGB.tif", image)
        write_rgb(folder / "5_Labels_all" / f"top_potsdam_{scene}_label.tif", label)


def patches(colors: NDArray[np.uint8], size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its label, uint8 [size,size,3] each: 64 squares of random classes, in the image dark and noisy."""
    draw = np.random.default_rng(seed)
    label = colors[np.kron(draw.integers(0, len(colors), (8, 8)), np.ones((size // 8, size // 8), np.int64))]
    return (label // 2 + draw.integers(0, 100, (size, size, 1))).astype(np.uint8), label


def write_rgb(path: Path, pixels: NDArray[np.uint8]) -> None:
    height, width, _ = pixels.shape
    profile = {"driver": "GTiff", "width": width, "height": height, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", transform=from_origin(366_676, 5_808_650, 0.05, 0.05), **profile) as raster:
        raster.write(pixels.transpose(2, 0, 1))


def rule_of(command: str) -> Callable[[str, Path], None]:
    for pattern, rule in RULES:
        if re.fullmatch(pattern, command):
            return rule
    pytest.fail(f"no rule of this test runs the README's {command!r}")


def test_every_command_falls_under_a_rule() -> None:
    assert len(SECTIONS) > 3
    for section in SECTIONS.values():
        for command in section:
            rule_of(command)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "section",
    [pytest.param(section, marks=[] if section in QUICK else [pytest.mark.matrix]) for section in SECTIONS],
)
def test_the_commands_of_a_section_work_in_their_order(section: str, work: Path) -> None:
    for command in SECTIONS[section]:
        rule_of(command)(command, work)


@pytest.mark.parametrize("page", ["README.md", "launch/README.md", "docs/operations.md", "docs/comparing.md"])
def test_what_a_page_points_at_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"`((?:configs|launch|docs|dctc|shards)/[\w./-]+)`", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing + [file for file in files if not (ROOT / file).exists()] == []


def test_the_demo_is_said_to_be_synthetic() -> None:
    assert "synthetic" in (ROOT / "README.md").read_text().split("## ")[0].split("make test")[1]


def test_commands_are_found_in_indented_blocks_without_their_comments() -> None:
    text = "a\n\n```bash\none # first\ntwo \\\n  more\n```\n\n1. x\n\n   ```bash\n   three\n   ```\n"
    assert commands(text) == ["one", "two    more", "three"]
