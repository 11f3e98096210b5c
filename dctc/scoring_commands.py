"""The commands that hold a model against data: ``dctc evaluate`` and ``dctc suggest``; dctc.cli takes them over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dctc.arguments import AsJson, Device, Model, beside_model, device_of, load_model
from dctc.terminal import out, progress_bar, show_evaluation, show_scenes
from shards.errors import InputError


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be made ({error.strerror}); name another by --out") from None


def suggest(
    folder: Annotated[str, typer.Argument(metavar="DATASET", help="folder or URL")],
    model: Model,
    budget: Annotated[int, typer.Option(min=1, help="how many tiles to label next")],
    file: Annotated[Path, typer.Option("--out", help="GeoPackage of their footprints; lists of ids lie beside it")],
    share: Annotated[
        str | None, typer.Option("--labelled-share", help="as in training: all other tiles count as unlabelled")
    ] = None,
    net: Annotated[str | None, typer.Option(help="whose entropy counts; default: the headline")] = None,
    batch: Annotated[int, typer.Option(min=1, help="tiles at once")] = 8,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Suggest which unlabelled training tiles to label next: where the model is uncertain, spread over the scenes.

    Example: dctc suggest datasets/synthetic runs/synthetic-scene/dctc-1_8-s0/model.safetensors --budget 20
    --labelled-share 1/8 --out tiles.gpkg
    """
    from dctc.suggest.choose import suggest as chosen_of
    from dctc.suggest.files import records_of, write_footprints, write_lists
    from shards.manifest import Dataset, parse_share

    if "://" in str(file) or file.suffix != ".gpkg":
        raise InputError(f"--out {file}: name a GeoPackage of this machine, as tiles.gpkg")
    dataset = Dataset.open(folder)
    with progress_bar("tiles") as advance:
        chosen = chosen_of(
            load_model(model, device_of(device)), dataset, budget,
            share=None if share is None else parse_share(share), net=net, batch=batch, progress=advance,
        )  # fmt: skip
    records = records_of(dataset, chosen)
    layers = write_footprints(file, records)
    lists = write_lists(file, dataset, chosen)
    overrides = ["labelled.by=tile", "splits.protocol=files", "splits.files.rest=drop"]
    overrides += [f"{key}={path.resolve()}" for key, path in lists.items()]
    total = dataset.manifest.labelled.total
    wanted = "1" if share is None else f"{len(chosen.labelled) + budget}/{total}"
    if as_json:
        tiles = [{key: value for key, value in record.items() if key not in ("crs", "corners")} for record in records]
        facts = {"tiles": tiles, "candidates": chosen.candidates, "labelled": len(chosen.labelled), "layers": layers}
        print(json.dumps(facts | {"shard_overrides": overrides, "labelled_share": wanted}, indent=1))
        return
    for record in records:
        out.print(f"{record['rank']:>4}  {record['tile']}  {record['score']:.3f}", markup=False)
    scenes = len({record["scene"] for record in records})
    out.print(
        f"{budget} of {chosen.candidates} unlabelled tiles, in {scenes} scenes; footprints in {file}", markup=False
    )
    out.print(f"when they are labelled: dctc shard RECIPE OUT {' '.join(overrides)}", markup=False)
    out.print(f"and train with data.labelled_share={wanted}", markup=False)


def evaluate(
    model: Model,
    folder: Annotated[str, typer.Argument(metavar="DATASET", help="folder or URL")],
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    batch: Annotated[int, typer.Option(min=1, help="tiles at once")] = 8,
    tta: Annotated[bool, typer.Option("--tta", help="average over eight flips and quarter turns")] = False,
    report: Annotated[Path | None, typer.Option("--out", help="folder for tables and confusion matrices")] = None,
    scenes: Annotated[bool, typer.Option("--scenes", help="also map the split's scenes and score the maps")] = False,
    root: Annotated[Path | None, typer.Option(help="with --scenes: the folder that `dctc shard --root` had")] = None,
    net: Annotated[str | None, typer.Option(help="with --scenes: whose maps; default: the headline")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score every net of a model on the tiles of a split: all metrics, per class, confusion matrix, time and memory.

    Example: dctc evaluate runs/synthetic-scene/dctc-1_8-s0/model.safetensors datasets/synthetic --scenes
    --root scenes/synthetic
    """
    if not scenes and (root is not None or net is not None):
        raise InputError("--root and --net are for --scenes")
    from dctc.evaluation.model import evaluate_model
    from dctc.evaluation.report import write_evaluation
    from shards.manifest import Dataset

    bundle = load_model(model, device_of(device))
    dataset = Dataset.open(folder)
    whole = None
    if scenes:
        from dctc.whole_scenes.score import ScenesToScore

        # what cannot be scored is said at once
        whole = ScenesToScore.of(bundle, dataset, split, root or Path(), net, tta)
    destination = report or beside_model(model) / f"evaluation-{split}{'-tta' if tta else ''}"
    _make(destination)  # before the work
    evaluation = evaluate_model(bundle, dataset, split, batch, tta=tta)
    write_evaluation(destination, evaluation, split)
    digests = {"dataset": dataset.digest, "trained_on": bundle.description.dataset}
    record: dict[str, Any] = evaluation.as_record() | {"tta": tta} | digests
    if whole is not None:
        from dctc.whole_scenes.report import write_scenes

        with progress_bar("scenes") as advance:
            result = whole.score(destination / "maps", batch, bundle.device, advance)
        write_scenes(destination, result, split)
        record["scenes"] = result.as_record()
    if as_json:
        print(json.dumps(record, indent=1))
        return
    show_evaluation(record, bundle.headline)
    if digests["dataset"] != digests["trained_on"]:
        out.print(
            f"not the dataset that the model was trained on ({digests['dataset'][:12]}, and that was "
            f"{digests['trained_on'][:12]}): scenes of split {split} may be ones that it has learnt",
            markup=False,
        )
    if whole is not None:
        show_scenes(record["scenes"], tta)
    out.print(f"tables and confusion matrices in {destination}", markup=False)
