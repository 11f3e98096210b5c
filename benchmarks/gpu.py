"""Everything worth knowing on one CUDA device, in one go.

    python benchmarks/gpu.py [PART ...] [--out DIR] [--minutes M] [--device cuda|cpu] [--quick] [--data DIR]

Parts, each on its own and its lines written as they are found (printed, and appended to DIR/gpu.txt):

- speed: a round of every method with every network: seconds, images/s (of the streams that the method reads), against
  a plain float32 loop of the same maths, TFLOP/s, MFU (docs of `dctc.engine.flops`), peak memory; fp32, tf32, bf16,
  fp16, channels_last, compiled, larger batches. Medians; what matters most first, for the time may run out.
- correct: float32 against the plain loop; lower precision against float32, from the same weights on the same batches:
  losses, direction of the gradients, losses after more rounds.
- loader: what feeds the device. Copies of pinned uint8 batches ahead of the compute; where the data path's packages are
  installed, a packed dataset read with and without training.
- accuracy: the Dubai scenes (--data, a folder with "Tile 1", ...), every method at shares 1/8, 1/4, 1/2, seed by seed.

It needs torch, accelerate and numpy (and for accuracy pillow and PyYAML), nothing else that dctc needs, and says what
is left out for lack of a package. --minutes bounds each part: what has begun is finished, what has not is left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where dctc is not installed

import accelerate
import numpy as np
import torch

from benchmarks import gpu_accuracy, gpu_correct, gpu_loader, gpu_speed
from benchmarks.gpu_engine import Deadline, Report, device_name
from dctc.engine.parallel import Parallel
from dctc.networks import network_names

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("dctc", "supervised")  # whose rounds are updates alone; the others need the trainer
PARTS: dict[str, Callable[[argparse.Namespace, Parallel, Deadline, Report], bool]] = {
    "speed": gpu_speed.run,
    "correct": gpu_correct.run,
    "loader": gpu_loader.run,
    "accuracy": gpu_accuracy.run,
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; sizes that --quick makes tiny."""
    parser = argparse.ArgumentParser(description="Speed, correctness, loading and accuracy on one device")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.txt")
    parser.add_argument("--minutes", type=float, default=8, help="of each part")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/dubai_mbrsc", help="the Dubai scenes")
    parser.add_argument("--methods", type=_names, default=list(METHODS), help="NAME,NAME; all")
    parser.add_argument("--networks", type=_names, default=["unet"], help="NAME,NAME; for accuracy the first")
    parser.add_argument("--width", type=int, default=None, help="of the networks; 64")
    parser.add_argument("--tile", type=int, default=None, help="pixels; 512, for accuracy 256")
    parser.add_argument("--batch", type=int, default=None, help="tiles of each stream; 4, for accuracy 8")
    parser.add_argument("--rounds", type=int, default=None, help="of a training in part accuracy; 1500")
    options = parser.parse_args(given)
    known = {"part": (options.parts, list(PARTS)), "method": (options.methods, list(METHODS))}
    for kind, (chosen, names) in (known | {"network": (options.networks, network_names())}).items():
        if unknown := sorted(set(chosen) - set(names)):
            parser.error(f"no {kind} is called {', '.join(unknown)}: choose of {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here: --device cpu --quick shows whether everything runs")
    return options


def _names(text: str) -> list[str]:
    return text.split(",")


def describe(device: torch.device, emit: Report) -> None:
    """What the figures belong to."""
    emit(f"\n==== {time.strftime('%Y-%m-%d %H:%M')}: python benchmarks/gpu.py {' '.join(sys.argv[1:])}")
    parts = [
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"accelerate {accelerate.__version__}",
    ]
    parts.append(f"numpy {np.__version__}")
    if device.type == "cuda":
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]  # type: ignore[no-untyped-call]  # no types
        parts.append(f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB")
    emit(f"{device_name(device)} | {', '.join(parts)} | {platform.machine()}, {os.cpu_count()} CPU cores")


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts; 1 when one of them failed."""
    options = arguments(given)
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # also on a machine that has a GPU
    parallel = Parallel()
    emit = Report(options.out / "gpu.txt")
    describe(parallel.device, emit)
    good = True
    for name in options.parts or PARTS:
        start = time.monotonic()
        emit(f"\n-- {name}")
        try:
            good &= PARTS[name](options, parallel, Deadline(options.minutes), emit)
        except Exception:  # the next part is worth as much as this one
            emit(f"{name} FAILED:\n{traceback.format_exc()}")
            good = False
        emit(f"-- {name}: {time.monotonic() - start:.0f} s")
    parallel.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
