"""How fast is a scene predicted? `predict_scene` against the net alone, plain loops and torchgeo.

    python benchmarks/predict.py [--repeats N] [--torchgeo-python PYTHON] [--out FILE]

A U-Net with random weights predicts a made town's scene (GeoTIFF, tiled deflate). Each way is a process of its own
(`benchmarks.predict_ways`) with torch's threads limited alike; all make the whole map once per repeat, in turn, in an
order that is reversed each time. A way's figure is the median; shares are medians of the repeats' own ratios, because a
shared machine is faster in one minute than in the next.

- forward: the net alone on the very windows that dctc predicts, in the same batches, held in memory. Limit: dctc has
  90 % of its speed.
- plain: a rasterio loop, one window at a time, without overlap, and with dctc's windows of which the core is written.
- torchgeo: RasterDataset, GridGeoSampler and a DataLoader with one worker; its batches are averaged in a scene-sized
  array. Its environment is ours and, by `pip install --no-deps`: torchgeo==0.8.1 torchvision==0.15.2 (later ones do not
  import beside a torch for the CPU) geopandas lightning lightning-utilities lightly torchmetrics timm jsonargparse
  segmentation-models-pytorch.
- memory: the most proportional memory (PSS) of a way's processes during a first repeat, whose time does not count,
  above what the process has with the model loaded. The GPU's memory is not part of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

# Run as a script, this folder is sys.path[0]; the repository's root has to be.
if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import psutil
import rasterio
import torch
from rasterio.transform import Affine

from benchmarks.predict_ways import Setting
from benchmarks.sharding import KINDS, Report
from dctc.bundle import Description, save_bundle
from dctc.mapping.windows import Grid
from dctc.methods import build_method
from dctc.networks import NetworkSpec
from shards.manifest import ClassInfo
from shards.synth import render

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.9  # of the net's own speed
SAMPLE_S = 0.1  # between two looks at a way's memory
CLASSES = ("impervious_surface", "building", "low_vegetation", "tree", "car", "clutter")
TITLES = {
    "forward": "the net alone, same windows", "dctc": "dctc predict", "plain": "rasterio loop, no overlap",
    "plain overlap": "rasterio loop, same windows, rims cut", "torchgeo": "torchgeo, overlaps averaged",
}  # fmt: skip


@dataclass
class Measured:
    """Of one way: seconds by the clock and of the processor, repeat for repeat, and MiB above the loaded model."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    mebibytes: float = 0.0


class Way:
    """A process that makes the map when it is told to."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process = process
        self._log = log

    def ready(self) -> None:
        """Wait until the model is loaded."""
        self._line()

    def repeat(self) -> tuple[float, float]:
        """Make the map: seconds by the clock and of the processor."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        clock, processor = json.loads(self._line())
        return clock, processor

    def memory(self) -> float:
        """Make the map: the most MiB in use above what was in use before."""
        before, peak, done = self._in_use(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(SAMPLE_S):
                peak = max(peak, self._in_use())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.repeat()
        finally:
            done.set()
            watcher.join()
        return (peak - before) / 2**20

    def _in_use(self) -> float:
        total = 0.0
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += process.memory_full_info().pss
        return total

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self._process.args!r} ended:\n{self._log.read()}")
        return line


@contextmanager
def started(python: str, name: str, scene: Path, model: Path, setting: Setting) -> Iterator[Way]:
    """A way's process, ended with the block."""
    folder = scene.parent / name.replace(" ", "_")
    command = [python, "-m", "benchmarks.predict_ways", name, scene, model, folder, json.dumps(asdict(setting))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(setting.threads)}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=ROOT, env=environment,
        ) as process,
    ):  # fmt: skip
        try:
            way = Way(process, log)
            way.ready()
            yield way
        finally:
            process.kill()


def write_scene(path: Path, height: int, width: int) -> None:
    """A made town of this size in three bands, tiled deflate, with a sensor's noise."""
    town, _ = render(0, 0, 1024)
    repeats = (1, -(-height // 1024), -(-width // 1024))
    noise = np.random.default_rng(0).integers(-2, 3, (3, height, width), dtype=np.int16)
    image = np.tile(np.moveaxis(town, -1, 0), repeats)[:, :height, :width] + noise
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=height, width=width, dtype="uint8", crs="EPSG:32633",
        transform=Affine(0.5, 0, 4e5, 0, -0.5, 5.8e6), **KINDS["tiled deflate"],
    ) as file:  # fmt: skip
        file.write(image.clip(0, 255).astype(np.uint8))


def write_model(path: Path, width: int, tile: int) -> None:
    """A U-Net with random weights; its last biases are set so that all classes occur, else one has the whole map."""
    torch.manual_seed(0)
    network = NetworkSpec(3, len(CLASSES), "unet", width)
    method = build_method("supervised", network, {})
    town = torch.from_numpy(np.moveaxis(render(0, 0, 256)[0], -1, 0).copy())[None]
    for module in method.parts.values():
        module.eval()
    with torch.no_grad():
        logits = method.logits((town.float() - 110) / 50)[method.headline]
        method.parts["network"].get_parameter("decoder.head.bias").sub_(logits.mean((0, 2, 3)))
    classes = [ClassInfo(name=name, color=(40 * code, 0, 0)) for code, name in enumerate(CLASSES)]
    bands = ["red", "green", "blue"]
    description = Description("supervised", {}, network, bands, "uint8", [110.0] * 3, [50.0] * 3, classes, tile, "none")
    save_bundle(path, description, {name: module.state_dict() for name, module in method.parts.items()})


def measure(ways: Mapping[str, Way], repeats: int) -> dict[str, Measured]:
    """A first repeat for the memory, then all ways in turn."""
    found = {name: Measured(mebibytes=way.memory()) for name, way in ways.items()}
    for repeat in range(repeats):
        for name, way in list(ways.items())[:: -1 if repeat % 2 else 1]:
            clock, processor = way.repeat()
            found[name].clock.append(clock)
            found[name].processor.append(processor)
    return found


def share(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Our speed as a share of theirs: the median over the repeats."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def show(found: Mapping[str, Measured], megapixels: float, emit: Report) -> bool:
    """The table; whether the limit holds."""
    emit(f"\n{'':38}{'Mpx/s':>8}{'dctc to it':>12}{'CPU s':>8}{'dctc to it':>12}{'MiB':>7}  limit")
    ours = found["dctc"]
    for name, its in found.items():
        clock, processor = (share(getattr(ours, kind), getattr(its, kind)) for kind in ("clock", "processor"))
        verdict = ""
        if name == "forward":
            verdict = f"  {LIMIT:.2f} of its Mpx/s: {'holds' if clock >= LIMIT else 'MISSED'}"
        emit(
            f"{TITLES[name]:38}{megapixels / statistics.median(its.clock):8.3f}{clock:10.2f} x"
            f"{statistics.median(its.processor):8.2f}{processor:10.2f} x{its.mebibytes:7.0f}{verdict}"
        )
    ratios = [their / our for our, their in zip(ours.clock, found["forward"].clock, strict=True)]
    emit(f"\ndctc's share of the net's speed, repeat for repeat: {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    return share(ours.clock, found["forward"].clock) >= LIMIT


def agreement(folder: Path, names: Sequence[str], emit: Report) -> None:
    """Maps of one scene by one net differ at the windows' rims alone."""
    with rasterio.open(folder / "dctc" / "scene_classes.tif") as file:
        ours = file.read(1)
    for name in names:
        if name not in ("dctc", "forward"):
            with rasterio.open(folder / name.replace(" ", "_") / "map.tif") as file:
                emit(f"  {TITLES[name]}: {100 * np.mean(file.read(1) == ours):.2f} % of pixels as in dctc's map")


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Whole scenes against the net alone, plain loops and torchgeo")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, default=(820, 820), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile", type=int, default=256, help="pixels of a window's side")
    parser.add_argument("--width", type=int, default=16, help="of the U-Net")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=8, help="what dctc finds for a CPU at 256 px is 8")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--torchgeo-python", help="an interpreter that has torchgeo, and what dctc needs")
    parser.add_argument("--out", type=Path, help="write what is printed into this file, too")
    return parser.parse_args(words)


def head(options: argparse.Namespace, emit: Report) -> None:
    """What is measured, on what, when."""
    height, width = options.size
    emit(f"command: python benchmarks/predict.py {' '.join(sys.argv[1:])}".rstrip())
    load = " ".join(f"{mean:.1f}" for mean in os.getloadavg())
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), load {load} at the start"
    emit(f"date {time.strftime('%Y-%m-%d')}, {machine}, {device_name(options.device)}")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("rasterio", "numpy", "torch")]
    if options.torchgeo_python:
        asked = "import importlib.metadata as m; print(m.version('torchgeo'))"
        done = subprocess.run([options.torchgeo_python, "-c", asked], capture_output=True, text=True, check=True)
        versions.append(f"torchgeo {done.stdout.strip()}")
    emit(f"Python {platform.python_version()}, GDAL {rasterio.__gdal_version__}, {', '.join(versions)}")
    grid = Grid.over(height, width, options.tile, options.overlap)
    seen = grid.windows * options.tile**2 / (height * width)
    emit(
        f"scene {height} x {width} px, uint8, 3 bands, tiled deflate; U-Net of width {options.width}, random weights; "
        f"{grid.windows} windows of {options.tile} px, overlap {options.overlap}: each pixel is seen {seen:.2f} times"
    )
    emit(
        f"torch threads {options.threads}, {options.batch} windows a batch (the rasterio loops: 1); "
        f"medians of {options.repeats} repeats in turn"
    )


def device_name(device: str) -> str:
    """The GPU's, or that it is the CPU."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "on the CPU"


def main() -> int:
    """Print the table; 1 when the limit is missed."""
    options = options_of()
    emit = Report()
    head(options, emit)
    pythons = {name: sys.executable for name in TITLES if name != "torchgeo"}
    if options.torchgeo_python:
        pythons["torchgeo"] = options.torchgeo_python
    setting = Setting(options.overlap, options.batch, options.threads, options.device, workers=1)
    height, width = options.size
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        scene, model = folder / "scene.tif", folder / "model.safetensors"
        write_scene(scene, height, width)
        write_model(model, options.width, options.tile)
        ways = {
            name: stack.enter_context(started(python, name, scene, model, setting)) for name, python in pythons.items()
        }
        holds = show(measure(ways, options.repeats), height * width / 1e6, emit)
        agreement(folder, list(ways), emit)
    if "torchgeo" not in pythons:
        emit("  torchgeo was not measured: --torchgeo-python names no interpreter that has it")
    emit(f"load {os.getloadavg()[0]:.1f} at the end\n")
    emit("the limit holds" if holds else "THE LIMIT IS MISSED")
    if options.out is not None:
        options.out.write_text("\n".join(emit.lines) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
