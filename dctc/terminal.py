"""What the commands show to people: tables, lines, a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from shards.manifest import Dataset

SAY_EVERY_S = 10.0
EIGHT_VIEWS = ", mean of eight views"

out = Console(soft_wrap=True, highlight=False)


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal and nothing elsewhere; gives ``advance([step,] done, total)``."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(text, total=None)

        def advance(*state: Any) -> None:
            *step, done, total = state
            progress.update(task, description=" ".join([text, *map(str, step)]), completed=done, total=total)

        yield advance


@contextmanager
def map_progress(scenes: int, shown: bool) -> Iterator[Callable[[Path, int, int], None]]:
    """Speed and time left: a bar on a terminal, elsewhere lines; gives ``advance(scene, done, total)``."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)
    began = said = time.monotonic()
    with bar as progress:
        task = progress.add_task(f"{scenes} scenes", total=None, speed="")

        def advance(scene: Path, done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            rate = done / max(now - began, 1e-9)
            speed = f"{done / 1e6:.1f} of {total / 1e6:.1f} Mpx, {rate / 1e6:.2f} Mpx/s"
            progress.update(task, description=scene.name, completed=done, total=total, speed=speed)
            if shown and not console.is_terminal and now - said >= SAY_EVERY_S and done < total:
                said = now
                left = timedelta(seconds=round((total - done) / rate))
                print(f"{scene.name}: {speed}, {left} left", file=sys.stderr, flush=True)

        yield advance


def show_dataset(dataset: Dataset) -> None:
    """The tables of `dctc inspect`."""
    from shards.summary import tables

    for table in tables(dataset):
        out.print(table)
    out.print(f"dataset {dataset.location}, digest {dataset.digest[:12]}", markup=False)


def show_evaluation(record: dict[str, Any], headline: str) -> None:
    """Scores of every net, and IoU by class; ``record`` is that of ``Evaluation.as_record``."""
    nets = {name: net["scores"] for name, net in record["nets"].items()}
    kinds = {"miou": "mIoU", "pa": "PA", "mpa": "MPA", "f1": "F1", "kappa": "kappa"}
    kinds |= {key: key.replace("_", " ").replace("miou", "mIoU") for key in nets[headline] if "miou_without" in key}
    views = EIGHT_VIEWS if record["tta"] else ""
    means = Table("net", *kinds.values(), "ECE", "entropy", title=f"{record['tiles']} tiles{views}, in %")
    for name, scores in nets.items():
        values = [*(scores.get(key) for key in kinds), record["nets"][name]["ece"]]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        means.add_row(
            name, *cells, f"{record['nets'][name]['entropy']:.3f} nats", style="bold" if name == headline else ""
        )
    classes = Table("class", *nets, title="IoU in %")
    for label in nets[headline]["classes"]:
        values = [scores["classes"][label]["iou"] for scores in nets.values()]
        classes.add_row(label, *("-" if value is None else f"{100 * value:.1f}" for value in values))
    out.print(means)
    out.print(classes)
    agreement = "" if record["agreement"] is None else f"S1 and S2 agree on {record['agreement']:.1%} of the pixels; "
    speed = f"{record['seconds']:.1f} s, {record['tiles_per_s']:.1f} tiles/s"
    out.print(f"{agreement}{speed}, peak memory {record['peak_memory_gib']:.2f} GiB", markup=False)


def show_scenes(record: dict[str, Any], tta: bool) -> None:
    """Scores of each predicted scene and of all; ``record`` is that of ``SceneScores.as_record``."""
    views = EIGHT_VIEWS if tta else ""
    kinds = {"miou": "mIoU", "pa": "PA", "f1": "F1", "kappa": "kappa"}
    titles = [f"{title}{note}" for note in ("", " eroded") for title in kinds.values()]
    table = Table("scene", *titles, title=f"whole scenes, net {record['net']}{views}, in %")
    for name, parts in [*record["scenes"].items(), ("total", record["total"])]:
        scores = [parts[part] or {} for part in ("all", "eroded")]
        values = [score.get(kind) for score in scores for kind in kinds]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        table.add_row(name, *cells, style="bold" if name == "total" else "")
    out.print(table)
