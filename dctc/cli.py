"""The ``dctc`` command: one thin function a command. Heavy imports stand inside, so that ``--help`` is quick."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dctc.arguments import AsJson, Overrides, own_folder
from dctc.exporting.command import export
from dctc.maps import predict
from dctc.scoring_commands import evaluate, suggest
from dctc.terminal import out, progress_bar, show_dataset
from shards.errors import InputError

MENDED_BY_HAND = {  # errors of the system that say all there is to say, with the file's name
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.EMFILE, errno.ENFILE,
}  # fmt: skip

app = typer.Typer(
    name="dctc",
    help="Semantic segmentation of remote-sensing images from few labels: scenes -> shards -> training -> maps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command()
def synth(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="folder for the scenes", parser=own_folder)],
    scenes: Annotated[int, typer.Option(min=1, help="number of scenes")] = 12,
    size: Annotated[int, typer.Option(min=64, help="side of a scene in pixels")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same files")] = 0,
) -> None:
    """Write synthetic labelled scenes: procedural towns as GeoTIFFs in the Potsdam layout.

    Example: dctc synth scenes/synthetic --scenes 12 --size 512 --seed 0
    """
    from shards.synth import write_scenes

    with progress_bar("scenes") as advance:
        files = write_scenes(folder, scenes=scenes, size=size, seed=seed, progress=advance)
    out.print(f"{len(files)} files in {folder}", markup=False)


@app.command()
def shard(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="what the dataset is: configs/data/*.yaml")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="the dataset folder to make", parser=own_folder)],
    overrides: Overrides = None,
    root: Annotated[Path, typer.Option(help="the folder that the recipe's patterns start from")] = Path(),
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    dask: Annotated[str | None, typer.Option(metavar="ADDRESS", help="a Dask scheduler, tcp://host:8786")] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="go on with what is there, or start anew")] = True,
    verify: Annotated[bool, typer.Option("--verify", help="re-hash what is there before going on with it")] = False,
    picture: Annotated[Path | None, typer.Option(help="contact sheet of tiles; default: OUT/preview.png")] = None,
    as_json: AsJson = False,
) -> None:
    """Pack scenes into a dataset folder of tar shards. The bytes do not depend on workers or interruptions.

    Example: dctc shard configs/data/synthetic.yaml datasets/synthetic --root scenes/synthetic
    """
    from shards.pack import PREVIEW, pack
    from shards.progress import shown
    from shards.recipe import load_recipe
    from shards.stopping import stoppable
    from shards.summary import contact_sheet, summarize

    if workers is not None and dask is not None:
        raise InputError("--workers and --dask exclude each other: a cluster has as many workers as were started")
    plan = load_recipe(recipe, overrides or [])
    told = Console(stderr=True)  # a bar there, or plain lines among what is printed, where that is no JSON
    try:
        with stoppable(), shown(told if as_json or told.is_terminal else out) as progress:
            dataset = pack(
                plan, root, folder, workers=workers or os.cpu_count() or 1, dask=dask, resume=resume, verify=verify,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped: {folder} keeps what is finished; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(75) from None
    sheet = picture or folder / PREVIEW
    if picture is not None or not sheet.exists():  # packing anew removes it; a finished dataset may be read-only
        contact_sheet(dataset, sheet)
    if as_json:
        print(json.dumps(summarize(dataset) | {"report": asdict(dataset.report)}, indent=1))
        return
    show_dataset(dataset)
    for line in dataset.report.lines():
        out.print(line, markup=False)
    out.print(f"contact sheet {sheet}", markup=False)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DATASET", help="folder or URL")],
    picture: Annotated[Path | None, typer.Option(help="write a contact sheet of tiles with their labels")] = None,
    as_json: AsJson = False,
) -> None:
    """Show counts, classes, shares, statistics and splits of a dataset.

    Example: dctc inspect datasets/synthetic --picture sheet.png
    """
    from shards.manifest import Dataset
    from shards.summary import contact_sheet, summarize

    dataset = Dataset.open(folder)
    if picture is not None:
        contact_sheet(dataset, picture)
    if as_json:
        print(json.dumps(summarize(dataset), indent=1))
        return
    show_dataset(dataset)
    if picture is not None:
        out.print(f"contact sheet {picture}", markup=False)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(metavar="DATASET", help="folder or URL")],
    rebuild: Annotated[bool, typer.Option("--rebuild-index", help="write a lost index again from the shards")] = False,
    as_json: AsJson = False,
) -> None:
    """Re-hash every shard and index file; exit 1 with the names of what is damaged.

    Example: dctc verify datasets/synthetic
    """
    from shards.verify import rebuild_index
    from shards.verify import verify as damages_of

    if rebuild:
        lost = rebuild_index(folder)
        out.print(f"index columns written again: {', '.join(lost) or 'none was damaged'}", markup=False)
    damages = damages_of(folder)
    if as_json:
        print(json.dumps({"dataset": folder, "damages": damages}, indent=1))
    else:
        for damage in damages:
            out.print(damage, markup=False)
        out.print(f"{folder}: {f'{len(damages)} damaged' if damages else 'sound'}", markup=False)
    raise typer.Exit(1 if damages else 0)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="configs/DATASET/METHOD.yaml")],
    overrides: Overrides = None,
    launch: Annotated[Path | None, typer.Option(help="a file of launch/: how processes start")] = None,
    find: Annotated[
        bool, typer.Option("--find-batch-size", help="train nothing: measure which batches fit into memory")
    ] = False,
) -> None:
    """Train: one process here, or as `accelerate launch --config_file LAUNCH dctc/train.py CONFIG ...` does.

    Example: dctc train configs/synthetic/dctc.yaml data.labelled_share=1/8
    """
    settings = [str(config), *(overrides or [])]
    from dctc.machine import launcher

    if find:
        from dctc.batch_size import Search, find_batch_size

        start, world = launcher(launch)
        find_batch_size(
            Search(config, overrides or [], [sys.executable, *start], world), lambda line: out.print(line, markup=False)
        )
        return
    if launch is None:
        from dctc.train import command

        raise typer.Exit(command(settings))
    start, _ = launcher(launch)
    os.execv(sys.executable, [sys.executable, *start, *settings])  # signals then reach the launcher itself


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="configs/DATASET/table1.yaml and the like")],
    overrides: Overrides = None,
    row: Annotated[list[str] | None, typer.Option(help="only this row; may be given several times")] = None,
    share: Annotated[list[str] | None, typer.Option(help="only this share; several times")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only this seed; several times")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at once; default: one a GPU, one on CPU")] = None,
    launch: Annotated[
        Path | None, typer.Option(help="start each run with this file of launch/, one after another")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="go on, or refuse what is begun already")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the runs and start none")] = False,
) -> None:
    """Run a table of runs: methods x labelled shares x seeds. What is finished is not run again.

    Example: dctc sweep configs/synthetic/table1.yaml --dry-run
    """
    import torch

    from dctc.machine import launcher
    from dctc.sweep.plan import choose, load_sweep
    from dctc.sweep.run import SweepRunner, is_done

    plan = choose(load_sweep(file, overrides or []), row or [], share or [], seed or [])
    for twin, other in plan.twins.items() if not row else ():
        out.print(f"row {twin!r} is left out: with these settings it is the same as {other!r}", markup=False)
    if dry_run:
        for number, run in enumerate(plan.chosen, 1):
            state = "finished" if is_done(run) else "begun" if run.folder.exists() else ""
            out.print(f"[{number}/{len(plan.chosen)}] {run.title}: {run.folder} {state}".rstrip(), markup=False)
        return
    if not resume and any(run.folder.exists() for run in plan.chosen):
        begun = next(run.folder for run in plan.chosen if run.folder.exists())
        raise InputError(f"{begun}: is there already; choose another name in {file}, or go on with --resume")
    if launch is not None and (jobs or 1) > 1:
        raise InputError("--launch and --jobs exclude each other: a launch file takes all GPUs for one run")
    gpus = torch.cuda.device_count() if launch is None else 0
    if gpus and jobs is not None and jobs > gpus:
        raise InputError(f"--jobs {jobs}: this machine has {gpus} GPU(s), and each run gets one")
    start, _ = launcher(launch)
    runner = SweepRunner(
        plan, [sys.executable, *start], lambda line: out.print(line, markup=False), jobs or max(1, gpus), gpus > 0
    )
    raise typer.Exit(runner())


app.command()(evaluate)


app.command()(predict)


app.command()(export)
app.command()(suggest)


@app.command()
def compare(
    experiment: Annotated[str | None, typer.Argument(metavar="[EXPERIMENT]", help="default: the only one")] = None,
    rows: Annotated[str | None, typer.Option(help="tag of the rows; default: a sweep's rows, else method")] = None,
    cols: Annotated[str, typer.Option(help="tag of the columns; class: the IoU of each, a table a share")] = "share",
    sweep: Annotated[str | None, typer.Option(help="only the runs of this sweep")] = None,
    number: Annotated[
        int, typer.Option("--table", min=1, max=3, help="the paper's layout: 1 and 3 methods, 2 classes")
    ] = 1,
    of: Annotated[str | None, typer.Option(help="with --table 2: the classes of this row alone")] = None,
    beside: Annotated[
        str | None, typer.Option("--paper", help="potsdam, vaihingen or gid: the paper's figures beside one's own")
    ] = None,
    metric: Annotated[str, typer.Option(help="test metric: miou, pa, mpa, f1, kappa, ...")] = "miou",
    uri: Annotated[str | None, typer.Option(help="MLflow server; default as in training")] = None,
    runs: Annotated[Path, typer.Option(help="the runs folder, beside which mlflow.db lies")] = Path("runs"),
    report: Annotated[Path | None, typer.Option("--out", help="one HTML page with tables, curves, pictures")] = None,
    csv: Annotated[Path | None, typer.Option(help="the cells, unrounded")] = None,
    markdown: Annotated[Path | None, typer.Option(help="the tables as Markdown")] = None,
    figure: Annotated[Path | None, typer.Option(help="the score over the labelled share, .png or .svg")] = None,
) -> None:
    """Compare finished runs from MLflow: mean +- std over seeds, best in bold, one table a dataset.

    Example: dctc compare synthetic-scene --sweep table1 --out table1.html
    """
    from dctc.tracking import paper
    from dctc.tracking.compare import compare as tables_of
    from dctc.tracking.compare import compare_classes, side_by_side
    from dctc.tracking.comparison import CLASSES
    from dctc.tracking.report import Files
    from dctc.tracking.run import resolve_uri
    from dctc.tracking.tables import terminal_table

    if beside not in (None, *paper.DATASETS):
        raise InputError(f"--paper {beside}: the paper has {', '.join(paper.DATASETS)}")
    if of is not None and number != 2:
        raise InputError(f"--of {of}: is for --table 2, which has a table for each row")
    if metric != "miou" and number == 2:
        raise InputError(f"--metric {metric}: --table 2 has the IoU of each class")
    if metric != "miou" and cols == CLASSES:
        raise InputError(f"--metric {metric}: --cols class has the IoU of each class")
    if number == 2 and cols == CLASSES:
        raise InputError("--cols class: --table 2 has classes as rows; leave one of the two out")
    files = Files(report, csv, markdown, figure)
    files.check()
    server = resolve_uri(uri, runs)
    columns = "share" if cols == CLASSES else cols
    comparisons = tables_of(server, experiment, rows=rows, cols=columns, metric=metric, sweep=sweep, beside=beside)
    classes, beside_each_other = [], []
    if number == 2 or report is not None:
        classes = compare_classes(server, experiment, rows, columns, sweep, beside, of)
    if cols == CLASSES or (report is not None and columns == "share"):
        beside_each_other = side_by_side(comparisons, beside)
    chosen = classes if number == 2 else beside_each_other if cols == CLASSES else comparisons
    if not chosen:
        raise InputError(f"experiment {comparisons[0].experiment!r}: no finished run has test scores by class")
    for comparison in chosen:
        out.print(terminal_table(comparison))
    for line in files.write(server, comparisons, [*beside_each_other, *classes], chosen):
        out.print(line, markup=False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has, what will work, and what to fix.

    Example: dctc doctor
    """
    from dctc.machine import examine

    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=1))
        return
    table = Table("what", "found", show_edge=False)
    for what, found in findings["facts"].items():
        table.add_row(what, str(found))
    out.print(table)
    for advice in findings["to_fix"]:
        out.print(f"to fix: {advice}", markup=False)


def main() -> None:
    """The entry point: bad input is one message and exit code 2, anything unforeseen a traceback and 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale without a table's lines is no reason to fail
    try:
        app()
    except InputError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and (error.errno not in MENDED_BY_HAND or error.filename is None):
            raise
        reason = "no space is left there: make room, and run it again" if full else error.strerror
        print(f"error: {error.filename or 'a file, or the standard output'}: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":  # accelerate launch -m dctc.cli predict ...
    main()
