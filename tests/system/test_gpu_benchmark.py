"""`benchmarks/gpu.py` as it is typed, tiny and on the CPU, where only what a GPU machine has is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from benchmarks import gpu
from benchmarks.gpu import METHODS
from benchmarks.gpu_accuracy import RECIPE, class_ids, cut, miou
from benchmarks.gpu_engine import PLAIN
from dctc.evaluation.confusion import Scores

ROOT = Path(__file__).resolve().parents[2]
THERE = ("torch", "accelerate", "numpy", "safetensors", "pillow")
NEVER = {"deepspeed", "webdataset", "rasterio", "mlflow", "pydantic", "kornia", "rich", "matplotlib", "zlib_ng", "dask"}
# A finder that does not find is what a missing package looks like to all who ask, find_spec among them. The editable
# install goes as well: the script finds dctc by itself.
HIDING = """
import runpy, sys
hidden, script = set(sys.argv[1].split(",")), sys.argv[2]
class Finder:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Finder(f) for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.argv[:] = sys.argv[2:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    assert not hidden & {name.split(".")[0] for name in sys.modules}, "a package that is not there was imported"
"""
NETS = {"dctc": {"s1", "s2", "mean", "teacher"}, "supervised": {"s1"}}


def installed_with(names: tuple[str, ...]) -> set[str]:
    """Canonical names of these distributions and of all that they bring."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = canonicalize_name(ahead.pop())
        if name in found:
            continue
        found.add(name)
        needed = (Requirement(line) for line in distribution(name).requires or ())
        ahead += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def hidden() -> set[str]:
    """Top-level modules of every other distribution; dctc and shards lie in the checkout."""
    there = installed_with(THERE)
    owners = packages_distributions().items()
    return NEVER | {top for top, names in owners if not {canonicalize_name(n) for n in names} & (there | {"dctc"})}


@pytest.fixture(scope="module")
def towns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes laid out and coloured like Dubai's, the masks of tile 2 with a palette."""
    folder = tmp_path_factory.mktemp("towns")
    colours = np.array([one["color"] for one in yaml.safe_load(RECIPE.read_text())["classes"]], np.uint8)
    draw = np.random.default_rng(0)
    for tile in (1, 2, 5, 6, 8):
        for part in (1, 9):
            ids = np.kron(draw.integers(0, len(colours), (8, 10)), np.ones((12, 12), np.int64))
            for kind, pixels in (("images", colours[ids] // 2 + 40), ("masks", colours[ids])):
                path = folder / f"Tile {tile}" / kind / f"image_part_{part:03d}.{'jpg' if kind == 'images' else 'png'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(pixels)
                palette = kind == "masks" and tile == 2
                (image.quantize(16, method=Image.Quantize.MAXCOVERAGE) if palette else image).save(path)
    return folder


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script where little is installed."""
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", HIDING, ",".join(sorted(hidden()))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [*command, str(ROOT / "benchmarks/gpu.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd="/",
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def output(towns: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What all parts print, and what the file holds."""
    out = tmp_path_factory.mktemp("out")
    done = start("--device", "cpu", "--quick", "--data", towns, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, (out / "gpu.txt").read_text()


def part(text: str, name: str) -> str:
    """The lines of a part."""
    found = re.search(rf"^-- {name}\n(.*?)^-- {name}: \d+ s$", text, re.MULTILINE | re.DOTALL)
    assert found, text
    return found[1]


@pytest.mark.matrix
def test_the_file_holds_what_was_printed(output: tuple[str, str]) -> None:
    printed, kept = output
    assert kept == printed
    assert "CPU" in printed.splitlines()[2]
    assert "FAILED" not in printed


@pytest.mark.matrix
def test_speed_has_a_line_for_each_method_network_and_setting(output: tuple[str, str]) -> None:
    text = part(output[0], "speed")
    known = ["plain loop, fp32", "fp32", "bf16 channels_last", "bf16 channels_last compiled", "bf16"]
    for method in METHODS:
        for network in ["unet"]:
            for setting in known:
                found = re.search(rf"^{method} +{network} +{re.escape(setting)} +2\+2 +(.*)$", text, re.MULTILINE)
                assert found, (method, network, setting, text)
                milliseconds, pace, ratio, _, mfu, memory, _ = found[1].split()
                tiles = 2 if method == "supervised" else 4
                assert float(pace) == pytest.approx(1000 * tiles / float(milliseconds), rel=0.02)
                assert float(ratio) > 0
                assert (mfu, memory) == ("-", "-"), "neither is known of a CPU"
            for dtype in ("tf32", "fp16"):
                line = next(one for one in text.splitlines() if one.startswith(method) and f" {dtype} " in one)
                assert "not available" in line or float(line.split()[-6]) > 0, line
    assert "all lines measured" in text


@pytest.mark.matrix
def test_float32_rounds_are_those_of_the_plain_loop(output: tuple[str, str]) -> None:
    text = part(output[0], "correct")
    assert text.count(": holds") == len(PLAIN)
    apart = re.findall(r"losses differ by (\S+) at most", text)
    assert all(float(value) < 1e-5 for value in apart), "far below the limit, which allows for a GPU"
    terms = re.search(r"^bf16 +relative error of the losses of round 1: (teacher .*)$", text, re.MULTILINE)
    assert terms, text
    assert all(0 <= float(cell.split()[1]) < 0.05 for cell in terms[1].split(", "))
    cosines = re.findall(r"1 - cosine of the gradients, .*? / (\w+) +(\S+)$", text, re.MULTILINE)
    assert {name for name, _ in cosines} >= {"teacher", "encoder", "s1", "s2", "network"}
    assert all(0 <= abs(float(value)) < 0.5 for _, value in cosines)


@pytest.mark.matrix
def test_loader_copies_and_says_what_it_lacks(output: tuple[str, str]) -> None:
    text = part(output[0], "loader")
    for source in ("resident", "copied when asked for", "copied ahead"):
        found = re.search(rf"^{source} +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
        assert found, text
        assert float(found[2]) > 0
        assert 0 <= float(found[3]) <= 100
    assert "SKIPPED, not installed here: pydantic, webdataset, rasterio, kornia, zlib_ng\n" in text


@pytest.mark.matrix
def test_accuracy_scores_each_net(output: tuple[str, str]) -> None:
    text = part(output[0], "accuracy")
    # 96 x 120 px: four tiles of 64 a scene, the least of which has 32 x 56 px.
    assert "tiles of 64 px: train 16, val 16, test 8;" in text
    for method, nets in NETS.items():
        line = next(one for one in text.splitlines() if one.startswith("seed 0  share 1/2") and method in one)
        scores = dict(re.findall(r"(\w+) (\S+) \(val", line))
        assert set(scores) == nets, line
        assert all(0 <= float(score) <= 100 for score in scores.values())
    assert text.splitlines()[-len(NETS) - 1].startswith("method"), "the summary comes last"


@pytest.mark.slow
def test_parts_out_of_time_or_data_say_so_and_lines_are_appended(tmp_path: Path) -> None:
    (tmp_path / "gpu.txt").write_text("an earlier run\n")
    limits = ("--minutes", 0, "--data", tmp_path / "nowhere")
    done = start("speed", "accuracy", "--device", "cpu", "--quick", "--out", tmp_path, *limits)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpu.txt").read_text() == "an earlier run\n" + done.stdout
    assert re.search(r"^\d\d lines not measured: out of time$", part(done.stdout, "speed"), re.MULTILINE)
    assert part(done.stdout, "accuracy").startswith("SKIPPED: ")
    assert "-- loader" not in done.stdout


def test_a_part_that_fails_leaves_the_others_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError("no such kernel")

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(gpu.PARTS, "speed", broken)
    arguments = ["speed", "accuracy", "--device", "cpu", "--out", str(tmp_path), "--data", str(tmp_path)]
    assert gpu.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "speed FAILED:" in printed
    assert "RuntimeError: no such kernel" in printed
    assert part(printed, "accuracy").startswith("SKIPPED: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "no part is called fast"),
        (["--methods", "dctc,fast"], "no method is called fast: choose of dctc"),
        (["--networks", "fast"], "no network is called fast"),
        ([], "--device cpu"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.arguments(arguments)
    assert message in capsys.readouterr().err


def test_mean_iou_is_the_one_of_the_evaluation() -> None:
    matrix = torch.randint(0, 50, (5, 5), generator=torch.Generator().manual_seed(1))
    matrix[3], matrix[:, 3] = 0, 0  # absent
    assert miou(matrix) == pytest.approx(Scores(tuple("abcde"), matrix.numpy()).miou)


def test_colours_and_tiles() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    building, black = recipe["classes"][0]["color"], [0, 0, 0]
    ids = class_ids(np.array([[building, black]], np.uint8), recipe, Path("mask.png"))
    assert ids.tolist() == [[0, 255]]
    with pytest.raises(ValueError, match=r"mask\.png: holds a colour"):
        class_ids(np.array([[[1, 2, 3]]], np.uint8), recipe, Path("mask.png"))
    image = np.arange(10 * 9 * 3, dtype=np.uint8).reshape(10, 9, 3)
    tiles = list(cut(image, np.full((10, 9), 4, np.uint8), 8, 0.25))
    assert len(tiles) == 2, "the sliver of one column is left out"
    pixels, labels, valid = tiles[1]
    assert (pixels[:, 1, 7] == image[9, 7]).all()
    assert valid.sum() == 16 == (labels == 4).sum()
    assert (labels[~valid] == 255).all()
