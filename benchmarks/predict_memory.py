"""How much memory does a map of a large scene take? It has to stay below 2 GiB, whatever the scene's height.

    OMP_NUM_THREADS=1 python benchmarks/predict_memory.py --out benchmarks/results/predict_memory.txt

Two scenes of one width, four uint8 bands, tiled 512, LZW; the second is ten times as tall as the first. Each is
predicted in a process of its own, with a stand-in net of two students that has no weights, so that what is measured is
all but a model: windows of 512 px of which two are predicted at once, six classes. `before` is what imports and the
net take; the limit holds for the whole process. `--all` writes every kind of map.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import Affine
from rasterio.windows import Window
from torch import Tensor

from dctc.mapping.polygons import PolygonOptions
from dctc.mapping.predict import predict_scene
from shards.manifest import ClassInfo

LIMIT_MIB = 2048
TILE = 512
CLASSES = 6
PATCH = 64  # side of the squares of one value that a scene is made of


class StandIn:
    """A net without weights: a class's logit is a band's value, or what is left to the largest one."""

    bands = ("red", "green", "blue", "nir")
    dtype = "uint8"
    mean = (0.0,) * 4
    tile_size = TILE
    headline = "s1"
    classes = tuple(ClassInfo(name=f"class {code}", color=(40 * code, 0, 0)) for code in range(CLASSES))

    def logits(self, raw: Tensor) -> Mapping[str, Tensor]:
        """Images [B,4,H,W] to logits [B,6,H,W] of two students, the second one less sure."""
        scaled = raw / 32
        s1 = torch.cat([scaled, 8 - scaled[:, :2]], 1)
        return {"s1": s1, "s2": s1 / 2}


def write_scene(path: Path, rows: int, width: int) -> None:
    """A scene of squares of random values, moved sideways from strip to strip."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (4, TILE // PATCH, -(-width // PATCH)), np.uint8)
    strip = coarse.repeat(PATCH, 1).repeat(PATCH, 2)[:, :, :width]
    place = Affine(0.05, 0, 366_675.1, 0, -0.05, 5_808_000.7)
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=rows, count=4, dtype="uint8", tiled=True, blockxsize=TILE,
        blockysize=TILE, compress="lzw", crs="EPSG:32633", transform=place, bigtiff="IF_SAFER",
    ) as file:  # fmt: skip
        for top in range(0, rows, TILE):
            height = min(TILE, rows - top)
            file.write(np.roll(strip, top // 7, 2)[:, :height], window=Window(0, top, width, height))


def resident_mib(key: str) -> float:
    """What the kernel says of this process: VmRSS, memory now, or VmHWM, the most it ever had; in MiB.

    Not ``getrusage``, whose maximum begins with that of the process which started this one.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


def measure(scene: Path, out: Path, everything: bool) -> dict[str, float]:
    """Predict one scene in this process."""
    model = StandIn()
    before = resident_mib("VmRSS")
    kinds: dict[str, Any] = {}
    if everything:
        kinds = {"probabilities": True, "entropy": True, "disagreement": True, "polygons": PolygonOptions()}
    outputs = predict_scene(model, scene, out, batch=2, **kinds)
    return {
        "before": before,
        "peak": resident_mib("VmHWM"),
        "seconds": outputs.seconds,
        "speed": outputs.pixels_per_s / 1e6,
    }


def in_a_child(folder: Path, rows: int, width: int, everything: bool) -> dict[str, float]:
    """Make a scene and predict it, both in processes of their own."""
    scene = folder / f"{rows}.tif"
    write_scene(scene, rows, width)
    command = [sys.executable, __file__, "--measure", str(scene), *(["--all"] if everything else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def report(rows: list[int], width: int, everything: bool) -> tuple[list[str], bool]:
    """The table's lines, and whether the limit holds."""
    lines = [
        f"command: python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}".rstrip(),
        f"date {date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}, torch {torch.__version__} on {torch.get_num_threads()} threads",
        f"GDAL {rasterio.__gdal_version__}, rasterio {rasterio.__version__}, numpy {np.__version__}",
        f"4 uint8 bands, windows of {TILE} px, overlap 0.25, {CLASSES} classes, "
        + ("all kinds of maps" if everything else "the class map alone"),
        "",
        f"{'rows x width':>15} {'before':>8} {'peak':>8} {'limit':>8}  of the limit {'s':>8} {'Mpx/s':>7}   (MiB)",
    ]
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for count in rows:
            found = in_a_child(Path(folder), count, width, everything)
            peaks.append(found["peak"])
            lines.append(
                f"{f'{count} x {width}':>15} {found['before']:8.0f} {found['peak']:8.0f} {LIMIT_MIB:8d}  "
                f"{found['peak'] / LIMIT_MIB:12.0%} {found['seconds']:8.0f} {found['speed']:7.2f}"
            )
    holds = max(peaks) < LIMIT_MIB
    lines += ["", f"peak memory below {LIMIT_MIB} MiB: {'holds' if holds else 'DOES NOT HOLD'}"]
    return lines, holds


def main() -> None:
    """Measure, print, and exit 1 when over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000, help="height of the taller scene")
    parser.add_argument("--width", type=int, default=30_000)
    parser.add_argument("--all", action="store_true", help="write every kind of map")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        with tempfile.TemporaryDirectory(dir=options.measure.parent) as out:
            print(json.dumps(measure(options.measure, Path(out), options.all)))
        return
    lines, holds = report([max(1, options.rows // 10), options.rows], options.width, options.all)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)
    sys.exit(not holds)


if __name__ == "__main__":
    main()
