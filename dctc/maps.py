"""The command ``dctc predict``. Heavy imports stand inside, so that ``--help`` is quick."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dctc.arguments import AsJson, Device, Model, band_numbers, device_of, loaded_model, own_folder
from dctc.terminal import map_progress, out
from shards.errors import InputError
from shards.stopping import stoppable

if TYPE_CHECKING:
    from dctc.mapping.scenes import Predicted


def predict(
    model: Model,
    scenes: Annotated[list[Path], typer.Argument(metavar="SCENE...", help="rasters, or folders of them")],
    folder: Annotated[Path, typer.Option("--out", help="folder for the maps", parser=own_folder)],
    net: Annotated[str | None, typer.Option(help="s1, s2, mean, teacher, ...; default: the headline")] = None,
    overlap: Annotated[float, typer.Option(help="share of a window's side that neighbours share, 0 to 0.9")] = 0.25,
    batch: Annotated[int | None, typer.Option(min=1, help="windows at once; default: found for the device")] = None,
    bands: Annotated[str | None, typer.Option(help="which bands of the scene are the model's, as 3,2,1")] = None,
    nodata: Annotated[
        float | None, typer.Option(help="pixel value without data, where the scene declares none")
    ] = None,
    tta: Annotated[bool, typer.Option("--tta", help="average over eight flips and quarter turns")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="also write class probabilities")] = False,
    entropy: Annotated[bool, typer.Option("--entropy", help="also write the entropy in nats")] = False,
    disagreement: Annotated[
        bool, typer.Option("--disagreement", help="also write how far the students differ, 0 to 1")
    ] = False,
    polygons: Annotated[bool, typer.Option("--polygons", help="also write polygons as a GeoPackage")] = False,
    minimum: Annotated[float, typer.Option("--polygon-min-area", help="leave out smaller ones, in pixels")] = 16,
    tolerance: Annotated[float, typer.Option("--polygon-tolerance", help="simplify outlines by, in pixels")] = 1,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="leave finished maps, or make all again")] = True,
    split: Annotated[
        bool | None,
        typer.Option(
            "--split-scenes/--whole-scenes",
            help="several processes share each scene, or each has its own; default: share when scenes are fewer",
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Predict georeferenced maps of whole scenes, on the scenes' own grids. What is finished is not made again.

    Example: dctc predict runs/synthetic-scene/dctc-1_8-s0/model.safetensors scene.tif --out maps --entropy
    """
    import torch

    from dctc.mapping.polygons import PolygonOptions
    from dctc.mapping.record import digest_of
    from dctc.mapping.scenes import PredictOptions, predict_scenes, scenes_of
    from dctc.mapping.team import Ranks, Team

    ranks = Ranks.from_environment()
    if as_json and ranks.world > 1:
        raise InputError("--json is for one process; with several, read OUT/SCENE_maps.json of each scene")
    numbers = band_numbers(bands)
    options = PredictOptions(
        net, overlap, tta, probabilities, entropy, disagreement,
        PolygonOptions(minimum, tolerance) if polygons else None, tuple(numbers) if numbers else None, nodata,
    )  # fmt: skip
    found = scenes_of(scenes, folder)
    gpus = torch.cuda.device_count()
    own = device_of(f"cuda:{ranks.local % gpus}" if device == "auto" and gpus and ranks.world > 1 else device)
    records = []
    together = ranks.world > 1 and (len(found) < ranks.world if split is None else split)
    try:
        with (
            stoppable(),
            Team(ranks) if together else nullcontext() as team,
            loaded_model(model, own) as (bundle, file),
            map_progress(len(found), ranks.rank == 0) as progress,
        ):
            for maps in predict_scenes(
                bundle, digest_of(file), found, folder, options, own,
                batch=batch, resume=resume, ranks=ranks, team=team, progress=progress,
            ):  # fmt: skip
                records.append(_record(maps))
                if not as_json:
                    _show(maps)
    except KeyboardInterrupt:
        print(f"stopped: {folder} keeps what is finished; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(75) from None
    if as_json:
        print(json.dumps(records, indent=1))


def _record(maps: Predicted) -> dict[str, Any]:
    speed = None if maps.pixels_per_s is None else maps.pixels_per_s / 1e6
    return {"scene": str(maps.scene), "files": [str(path) for path in maps.files], "mpx_per_s": speed}


def _show(maps: Predicted) -> None:
    how = "finished before" if maps.pixels_per_s is None else f"{maps.pixels_per_s / 1e6:.2f} Mpx/s"
    out.print(f"{', '.join(str(path) for path in maps.files)} ({how})", markup=False)
