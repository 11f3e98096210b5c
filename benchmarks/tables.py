"""Tables of runs at a size that two CPU cores work through in hours: `dctc sweep`, then `dctc compare`.

    python benchmarks/tables.py synthetic --work DIR [--jobs 2] [--out benchmarks/results]
    python benchmarks/tables.py dubai --data FOLDER --work DIR [--jobs 2] [--out benchmarks/results]
    python benchmarks/tables.py synthetic --study labels --work DIR
    python benchmarks/tables.py dubai --study labels --test all --data FOLDER --work DIR

`--study paper` (the default) is the paper's tables 1 to 3: all methods, shares 1/8, 1/4, 1/2 and 1, two seeds; width 8,
equal rounds, 4 + 4 tiles of 128 px. `--study labels` is the sweeps `extended` and `ablation` (docs/fewer_labels.md):
width 16, tiles of 64 px, long enough that the U-Net gains from labels. Dubai is at half of its resolution there, and of
its labels whole images are drawn, as people label them: single tiles all over the place leave the U-Net little to gain.
All rows of `labels` have Adam without weight decay, as in the paper; `--study decay` is the same with AdamW and a
decay of 0.5. `--rounds N` is a study at another length, filed apart. FOLDER holds the scenes of the Dubai dataset
("Tile 1", "Tile 2", ...); without it that half says that it is skipped. DIR keeps scenes, datasets and runs: the same
command goes on, what is finished is not run again. `--compare` writes the tables of what is there, `--sweeps` runs
some of a study's, further words (`--seed 0 --share 1/8 --row U-Net`) a part of each sweep, as for `dctc sweep`.
`--test` rotates Dubai's test tile; the other tiles train, each but for its part 009, which validates. `--test all`
works through the tiles, then shows them in one table. `--keep FILE.tar.xz` writes the finished runs' reports and
curves (not their weights) into an archive, and takes up that archive where DIR is new: a study may take several days
and machines. The peers are the rows; the limit is the U-Net with all labels.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.halved import halve
from benchmarks.kept import keep, restore

ROOT = Path(__file__).resolve().parent.parent
DCTC = Path(sys.executable).parent / "dctc"
STOPPED = 75
DUBAI, USUAL_TEST = (1, 2, 5, 6, 8), 8  # tiles at hand, and the recipe's test


@dataclass(frozen=True)
class Study:
    """What is run and shown.

    Attributes:
        stem: begins the names of the files of results.
        suffix: ends the folders of its scenes and dataset.
        scenes: of the synthetic towns: how many, and their side in pixels.
        tile: side in pixels.
        by: what is drawn for a labelled share of Dubai.
        halved: Dubai's scenes are.
        settings: of all runs.
        tables: the sweep of which runs, and in which layout.
        filed: ends the name of its experiment, and of its folder of runs.
    """

    title: str
    stem: str
    suffix: str
    scenes: tuple[int, int]
    tile: int
    by: str
    halved: bool
    settings: tuple[str, ...]
    tables: tuple[tuple[str, int], ...]
    filed: str = "scene"

    @property
    def sweeps(self) -> list[str]:
        """The sweeps of its tables."""
        return list(dict.fromkeys(sweep for sweep, _ in self.tables))


BATCHES = ("data.batch_labelled=4", "data.batch_unlabelled=4", "run.checkpoint_every=0")
PLAIN = ("optimizer.name=adam", "optimizer.weight_decay=0")
DECAY = ("optimizer.name=adamw", "optimizer.weight_decay=0.5")
LABELS = ("network.width=16", "schedule.rounds=4000", *BATCHES, "run.pictures_every=0", "evaluation.every=1000")
STUDIES = {
    "paper": Study(
        "Tables 1 to 3, reduced", "tables", "", (12, 512), 128, "tile", False,
        ("network.width=8", "schedule.rounds=600", *BATCHES, "run.pictures_every=600", "evaluation.every=200"),
        (("table1", 1), ("table1", 2), ("table3", 3)),
    ),
    "labels": Study(
        "Fewer labels", "labels", "-64", (64, 256), 64, "scene", True, (*LABELS, *PLAIN),
        (("extended", 1), ("extended", 2), ("ablation", 1)),
    ),
}  # fmt: skip
STUDIES["decay"] = replace(
    STUDIES["labels"],
    title="Fewer labels, with weight decay",
    stem="decay",
    settings=(*LABELS, *DECAY),
    filed="decay",
)


@dataclass(frozen=True)
class Place:
    """Where the runs of a study on a dataset are.

    Attributes:
        test: Dubai's test tile, None for another dataset.
        rounds: of its runs, where that is not the study's own number.
    """

    name: str
    test: int | None
    study: Study
    work: Path
    rounds: int | None = None

    @property
    def called(self) -> str:
        """The dataset, with its test tile where that is not the recipe's."""
        return self.name if self.test in (None, USUAL_TEST) else f"{self.name}-{self.test}"

    @property
    def experiment(self) -> str:
        """As runs on it are filed."""
        return f"{self.called}-{self.study.filed}{self._length}"

    @property
    def settings(self) -> list[str]:
        """Of all its runs."""
        longer = [] if self.rounds is None else [f"schedule.rounds={self.rounds}"]
        return [item for item in self.study.settings if not longer or not item.startswith("schedule.rounds=")] + longer

    @property
    def results(self) -> str:
        """Begins the names of its files of results."""
        return f"{self.study.stem}_{self.called}{self._length.replace('-', '_')}"

    @property
    def _length(self) -> str:
        return "" if self.rounds is None else f"-{self.rounds}"

    @property
    def dataset(self) -> Path:
        """Its folder."""
        return self.work / "datasets" / f"{self.called}{self.study.suffix}"

    @property
    def folder(self) -> Path:
        """Of its runs."""
        return self.work / "runs" / self.experiment

    @property
    def split(self) -> list[str]:
        """Settings of its recipe, where the test tile is not the recipe's."""
        if self.called == self.name:
            return []
        others = "".join(str(tile) for tile in DUBAI if tile != self.test)
        parts = {"test": f"t{self.test}_*", "val": f"t[{others}]_p009", "train": f"t[{others}]_*"}
        return [f'splits.scene.{kind}=["{pattern}"]' for kind, pattern in parts.items()]

    def part(self, table: str, layout: int) -> str:
        """Ends the name of the file of a table's cells."""
        return str(layout) if self.study.stem == "tables" else f"{table}_{layout}"

    def command(self, called: str, test: object) -> str:
        """As a study, with this test tile where there is one, is typed."""
        turned = f" --test {test}" if test else ""
        data = f"{turned} --data FOLDER" if self.name == "dubai" else ""
        data += "" if self.rounds is None else f" --rounds {self.rounds}"
        return f"python benchmarks/tables.py {self.name} --study {called} --work DIR{data}"

    def runs(self, *tables: str) -> list[Path]:
        """The reports of finished runs of these sweeps, or of all."""
        return [path for table in tables or self.study.sweeps for path in self.folder.glob(f"{table}-*/report.json")]


def main() -> int:
    """Make the runs and the tables of one dataset."""
    wanted, further = arguments()
    work: Path = wanted.work.resolve()
    name: str = wanted.dataset
    study = STUDIES[wanted.study]
    sweeps = wanted.sweeps or study.sweeps
    if strange := set(sweeps) - set(study.sweeps):
        print(
            f"study {wanted.study} has no sweep {', '.join(sorted(strange))}: {', '.join(study.sweeps)}",
            file=sys.stderr,
        )
        return 2
    if wanted.compare and further:
        print(f"{shlex.join(further)}: with --compare there is no sweep to take this", file=sys.stderr)
        return 2
    if name == "dubai" and wanted.data is None and not wanted.compare:
        print("dubai: SKIPPED, its scenes are not at hand: give their folder as --data", file=sys.stderr)
        return 0
    tests = (None,) if name == "synthetic" else DUBAI if wanted.test == "all" else (int(wanted.test),)
    places = [Place(name, test, study, work, wanted.rounds) for test in tests]
    try:
        if wanted.keep and restore(wanted.keep, work):
            print(f"{work}: goes on with the runs of {wanted.keep}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    code = 0
    if not wanted.compare:
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the sweep, which saves its runs and ends with 75
        code = train(places, sweeps, wanted, further)
        if code == STOPPED:
            print("stopped: the same command goes on", file=sys.stderr)
            return STOPPED
    if not any(place.runs() for place in places):
        for place in places:
            print(f"{place.folder}: no finished run of {', '.join(study.sweeps)}", file=sys.stderr)
        return 1
    wanted.out.mkdir(parents=True, exist_ok=True)
    for place in places:
        if place.runs():
            write(place, wanted.study, wanted.out)
    if len(places) > 1:
        usual = next(place for place in places if place.test == USUAL_TEST)  # its files are named without a tile
        save(wanted.out / f"{usual.results}_rotation.md", rotation(places, wanted.study, wanted.out))
    return code


def train(places: list[Place], sweeps: list[str], wanted: argparse.Namespace, further: list[str]) -> int:
    """Train what is not finished; the highest exit code of the sweeps, ``STOPPED`` as soon as one was."""
    code = 0
    for place in places:
        make_dataset(place, wanted.data)
        for table in sweeps:
            code = max(code, sweep(place, table, wanted.jobs, further))
            if wanted.keep and any(place.runs() for place in places):
                keep(place.work, wanted.keep)
            if code == STOPPED:
                return code
    return code


def write(place: Place, called: str, out: Path) -> None:
    """The tables of what has been run, into files and onto the terminal."""
    lines = head(place, called)
    for table, layout in place.study.tables:
        lines += compared(place, table, layout, out) if place.runs(table) else [f"`{table}`: no finished run", ""]
    save(out / f"{place.results}.md", lines)


def save(file: Path, lines: list[str]) -> None:
    """Into a file, whole or not at all, and onto the terminal."""
    text = "\n".join(lines)
    draft = file.with_name(f"{file.name}.part")
    draft.write_text(text)
    draft.replace(file)
    print(text)


def rotation(places: list[Place], called: str, out: Path) -> list[str]:
    """The scores of the tables just written, a column a test tile, and their mean where a row has all tiles."""
    scores: dict[tuple[str, str, str], dict[int | None, tuple[float, str]]] = {}
    for place in places:
        for table, layout in place.study.tables:
            cells = out / f"{place.results}_{place.part(table, layout)}.csv"
            if layout != 1 or not place.runs(table):
                continue
            with cells.open(newline="") as file:
                for cell in csv.DictReader(file):
                    seeds = "" if cell["seeds"] == "1" else f" ({cell['seeds']})"
                    at = (cell["row"], cell["net"], cell["column"])
                    scores.setdefault(at, {})[place.test] = (float(cell["mean"]), seeds)
    lines = [
        f"# {places[0].study.title}: {places[0].name}, each test tile in turn",
        "",
        f"    {places[0].command(called, 'all')} --compare",
        "",
        "Test mIoU in %, in brackets the number of seeds where it is not one; each column is a table of its own here.",
        "",
        f"| row | net | share | {' | '.join(f'tile {place.test}' for place in places)} | mean |",
        f"|---|---|---|{'---|' * (len(places) + 1)}",
    ]
    for (row, net, share), of in sorted(scores.items()):
        values = [f"{100 * of[place.test][0]:.1f}{of[place.test][1]}" if place.test in of else "–" for place in places]
        mean = f"{100 * sum(score for score, _ in of.values()) / len(of):.1f}" if len(of) == len(places) else "–"
        lines.append(f"| {' | '.join((row, net, share, *values, mean))} |")
    return [*lines, ""]


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """What was typed, and what is for `dctc sweep`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("synthetic", "dubai"))
    parser.add_argument("--study", choices=tuple(STUDIES), default="paper", help="which runs and tables")
    parser.add_argument("--sweeps", nargs="+", help="of the study; default: all of them")
    parser.add_argument("--data", type=Path, help="folder of the Dubai scenes")
    tests = (*map(str, DUBAI), "all")
    parser.add_argument("--test", choices=tests, default=str(USUAL_TEST), help="Dubai's test tile, or each in turn")
    parser.add_argument("--rounds", type=positive, help="of each run, in place of the study's own number")
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, datasets and runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--keep", type=Path, help="archive of finished runs: taken up, and written")
    parser.add_argument("--compare", action="store_true", help="train nothing")
    return parser.parse_known_args()


def positive(text: str) -> int:
    """A number of rounds."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def dctc(*words: object) -> int:
    """Run a command of dctc from the repository's root, and show it first; SIGTERM is for it, as Ctrl-C is."""
    command = [str(DCTC), *map(str, words)]
    print("$", shlex.join(["dctc", *command[1:]]), flush=True)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | threads) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return STOPPED if code == -signal.SIGTERM else code


def must(*words: object) -> None:
    """Run a command of dctc; where it fails, end with its exit code."""
    if code := dctc(*words):
        sys.exit(code)


def make_dataset(place: Place, data: Path | None) -> None:
    """Pack the scenes; of what is packed already nothing is done again."""
    study, settings = place.study, [f"tile.size={place.study.tile}", *place.split]
    if data is None or place.name == "synthetic":
        scenes = place.work / f"scenes{study.suffix}"
        must("synth", scenes, "--scenes", study.scenes[0], "--size", study.scenes[1])
    else:
        settings.append(f"labelled.by={study.by}")
        scenes = place.work / f"scenes-{place.name}-halved" if study.halved else data
        if study.halved:
            try:
                halve(data, scenes)
            except FileNotFoundError as error:
                sys.exit(str(error))
    must("shard", f"configs/data/{place.name}.yaml", place.dataset, "--root", scenes, *settings)


def sweep(place: Place, table: str, jobs: int, further: list[str]) -> int:
    """Run a sweep; its exit code."""
    where = (f"data.dataset={place.dataset}", f"run.output={place.work / 'runs'}", f"run.experiment={place.experiment}")
    return dctc("sweep", f"configs/{place.name}/{table}.yaml", *where, *place.settings, "--jobs", jobs, *further)


def head(place: Place, called: str) -> list[str]:
    """What was run, where, with what, and how long it took."""
    name, study = place.name, place.study
    reports = [json.loads(path.read_text()) for path in sorted(place.runs())]
    seconds = sum(report["train_seconds"] for report in reports)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "accelerate", "mlflow"))
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), one a run; Python {platform.python_version()}"
    return [
        f"# {study.title}: {place.called}",
        "",
        f"    {place.command(called, place.test if place.split else None)}",
        "",
        f"Date {date.today()}; {machine}, {versions}.",
        f"Configs `configs/{name}/` with `{' '.join(place.settings)}`.",
        f"{len(reports)} runs, {seconds / 3600:.1f} hours of training in all.",
        "",
    ]


def compared(place: Place, table: str, layout: int, out: Path) -> list[str]:
    """The Markdown of `dctc compare`, below its command; the cells as CSV go into a file beside it."""
    cells = out / f"{place.results}_{place.part(table, layout)}.csv"
    store = f"sqlite:///{place.work / 'mlflow.db'}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.md"
        words = ("compare", place.experiment, "--sweep", table, "--table", layout)
        must(*words, "--uri", store, "--csv", cells, "--markdown", file)
        return [f"    {shlex.join(['dctc', *map(str, words)])}", "", file.read_text()]


if __name__ == "__main__":
    sys.exit(main())
