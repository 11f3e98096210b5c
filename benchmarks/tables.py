"""The paper's tables 1 to 3 at a size that two CPU cores work through in hours: `dctc sweep`, then `dctc compare`.

    python benchmarks/tables.py synthetic --work DIR [--jobs 2] [--out benchmarks/results]
    python benchmarks/tables.py dubai --data FOLDER --work DIR [--jobs 2] [--out benchmarks/results]

All methods, shares 1/8, 1/4, 1/2 and 1, two seeds; width 8, equal rounds, 4 + 4 tiles of 128 px. FOLDER holds the
scenes of the Dubai dataset ("Tile 1", "Tile 2", ...); without it that half says that it is skipped. DIR keeps scenes,
datasets and runs: the same command goes on, and what is finished is not run again. `--compare` writes the tables of
what is there. The peers are the rows; the limit is the U-Net that has all labels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DCTC = Path(sys.executable).parent / "dctc"
SIZE = (
    "network.width=8", "schedule.rounds=600", "data.batch_labelled=4", "data.batch_unlabelled=4",
    "run.checkpoint_every=0", "run.pictures_every=600", "evaluation.every=200",
)  # fmt: skip
SWEEPS = ("table1", "table3")
STOPPED = 75
TABLES = (("table1", 1), ("table1", 2), ("table3", 3))  # of which runs, and in which layout


def main() -> int:
    """Make the runs and the tables of one dataset."""
    wanted = arguments()
    work: Path = wanted.work.resolve()
    name: str = wanted.dataset
    if name == "dubai" and wanted.data is None and not wanted.compare:
        print("dubai: SKIPPED, its scenes are not at hand: give their folder as --data", file=sys.stderr)
        return 0
    code = 0
    if not wanted.compare:
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the sweep, which saves its runs and ends with 75
        make_dataset(name, work, wanted.data)
        for table in SWEEPS:
            code = max(code, sweep(name, table, work, wanted.jobs))
            if code == STOPPED:
                print("stopped: the same command goes on", file=sys.stderr)
                return STOPPED
    if not runs_of(name, work):
        print(f"{work / 'runs' / experiment(name)}: no finished run of {', '.join(SWEEPS)}", file=sys.stderr)
        return 1
    wanted.out.mkdir(parents=True, exist_ok=True)
    lines = head(name, work)
    for table, layout in TABLES:
        if runs_of(name, work, table):
            lines += compared(name, table, layout, work, wanted.out)
        else:
            lines += [f"`{table}`: no finished run", ""]
    text = "\n".join(lines)
    draft = wanted.out / f"tables_{name}.md.part"
    draft.write_text(text)
    draft.replace(draft.with_suffix(""))
    print(text)
    return code


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("synthetic", "dubai"))
    parser.add_argument("--data", type=Path, help="folder of the Dubai scenes")
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, datasets and runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--compare", action="store_true", help="train nothing")
    return parser.parse_args()


def dctc(*words: object) -> int:
    """Run a command of dctc from the repository's root, and show it first."""
    command = [str(DCTC), *map(str, words)]
    print("$", shlex.join(["dctc", *command[1:]]), flush=True)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, cwd=ROOT, env=os.environ | threads, check=False).returncode


def make_dataset(name: str, work: Path, data: Path | None) -> None:
    """Pack the scenes; of what is packed already nothing is done again."""
    scenes = work / "scenes" if data is None or name == "synthetic" else data
    if name == "synthetic" and dctc("synth", scenes, "--scenes", 12, "--size", 512):
        sys.exit(1)
    recipe = f"configs/data/{name}.yaml"
    if dctc("shard", recipe, work / "datasets" / name, "--root", scenes, "tile.size=128"):
        sys.exit(1)


def sweep(name: str, table: str, work: Path, jobs: int) -> int:
    """Run a sweep; its exit code."""
    where = (f"data.dataset={work / 'datasets' / name}", f"run.output={work / 'runs'}")
    return dctc("sweep", f"configs/{name}/{table}.yaml", *where, *SIZE, "--jobs", jobs)


def experiment(name: str) -> str:
    """As runs on this dataset are filed."""
    return f"{name}-scene"


def head(name: str, work: Path) -> list[str]:
    """What was run, where, with what, and how long it took."""
    reports = [json.loads(path.read_text()) for path in sorted(runs_of(name, work))]
    seconds = sum(report["train_seconds"] for report in reports)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "accelerate", "mlflow"))
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), one a run; Python {platform.python_version()}"
    return [
        f"# Tables 1 to 3, reduced: {name}",
        "",
        f"    python benchmarks/tables.py {name} --work DIR{' --data FOLDER' if name == 'dubai' else ''}",
        "",
        f"Date {date.today()}; {machine}, {versions}.",
        f"Configs `configs/{name}/` with `{' '.join(SIZE)}`.",
        f"{len(reports)} runs, {seconds / 3600:.1f} hours of training in all.",
        "",
    ]


def runs_of(name: str, work: Path, *tables: str) -> list[Path]:
    """The reports of finished runs of these sweeps, or of all."""
    folder = work / "runs" / experiment(name)
    return [path for table in tables or SWEEPS for path in folder.glob(f"{table}-*/report.json")]


def compared(name: str, table: str, layout: int, work: Path, out: Path) -> list[str]:
    """The Markdown of `dctc compare`, below its command; the cells as CSV go into a file beside it."""
    cells = out / f"tables_{name}_{layout}.csv"
    store = f"sqlite:///{work / 'mlflow.db'}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.md"
        words = ("compare", experiment(name), "--sweep", table, "--table", layout)
        if dctc(*words, "--uri", store, "--csv", cells, "--markdown", file):
            sys.exit(1)
        return [f"    {shlex.join(['dctc', *map(str, words)])}", "", file.read_text()]


if __name__ == "__main__":
    sys.exit(main())
