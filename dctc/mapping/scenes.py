"""Many scenes: which there are, which of them this process predicts, and which are finished already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dctc.mapping.polygons import PolygonOptions
from dctc.mapping.predict import SceneModel, predict_scene
from dctc.mapping.record import Record
from dctc.mapping.scene import Scene
from dctc.mapping.share import Part
from dctc.mapping.team import Ranks, Team
from shards.errors import InputError

RASTERS = {".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img"}  # what a folder is searched for
CPU_PIXELS = 1 << 19  # of a batch: more at once fill the caches and win nothing
GPU_WINDOWS = 64  # more at once win nothing either
GPU_SHARE = 0.6  # of the free memory; the blend and other processes need some


@dataclass(frozen=True)
class PredictOptions:
    """All that changes the maps of a scene; see :func:`dctc.mapping.predict.predict_scene`."""

    net: str | None = None
    overlap: float = 0.25
    tta: bool = False
    probabilities: bool = False
    entropy: bool = False
    disagreement: bool = False
    polygons: PolygonOptions | None = None
    bands: tuple[int, ...] | None = None
    nodata: float | None = None


@dataclass(frozen=True)
class Predicted:
    """The maps of one scene; ``pixels_per_s`` is None where they were finished before."""

    scene: Path
    files: list[Path]
    pixels_per_s: float | None


def scenes_of(paths: Sequence[Path], out: Path) -> list[Path]:
    """The scenes named, and of each folder named its rasters, by name.

    Raises:
        InputError: a folder without rasters or that the maps would go into, or two scenes of one name.
    """
    scenes: list[Path] = []
    for path in paths:
        if not path.is_dir():
            scenes.append(path)
            continue
        if path.resolve() == out.resolve():
            raise InputError(f"{out}: maps would lie among the scenes and be taken for some; choose another --out")
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in RASTERS and not p.name.startswith("."))
        if not found:
            raise InputError(f"{path}: no raster in this folder ({', '.join(sorted(RASTERS))})")
        scenes += found
    same: dict[str, list[str]] = defaultdict(list)
    for scene in scenes:
        same[scene.stem].append(str(scene))
    for names in same.values():
        if len(names) > 1:
            raise InputError(
                f"{' and '.join(names)} have the same file name, and so would their maps: predict them into two folders"
            )
    return scenes


def predict_scenes(
    model: SceneModel,
    digest: str,
    scenes: Sequence[Path],
    out: Path,
    options: PredictOptions,
    device: torch.device,
    *,
    batch: int | None = None,
    resume: bool = True,
    ranks: Ranks | None = None,
    team: Team | None = None,
    progress: Callable[[Path, int, int], None] | None = None,
) -> Iterator[Predicted]:
    """Predict this process's share of the scenes, one after another; what is finished is not made again.

    Args:
        digest: of the model file; maps of another model are made again.
        batch: windows at once; found for the device when left out, and no part of what a finished map is known by.
        ranks: every ``world``-th scene, from ``rank`` on, is this process's.
        team: instead of that, all processes predict each scene together, and the leader's results are given.
        progress: called with the scene, the pixels done of all its scenes and how many are to be done.

    Raises:
        InputError: from the first scene that does not fit the model, before any is predicted; and as
            :func:`dctc.mapping.predict.predict_scene` does.
    """
    ranks = ranks or Ranks()
    given = {name: getattr(options, name) for name in PredictOptions.__dataclass_fields__}
    record_of = {
        scene: Record(out, scene, digest, asdict(options) | {"net": options.net or model.headline})
        for scene in (scenes if team else scenes[ranks.rank :: ranks.world])
    }
    pixels: dict[Path, int] = {}
    for scene in record_of:
        with Scene(scene, model.bands, model.dtype, options.bands, options.nodata) as source:
            pixels[scene] = source.height * source.width
    finished = {scene: record.finished() if resume else None for scene, record in record_of.items()}
    if team is not None:  # by the time that others look, the leader may have finished some
        whole = team.same("finished", [files is not None for files in finished.values()])
        pairs = zip(finished.items(), whole, strict=True)
        finished = {scene: (files or []) if skip else None for (scene, files), skip in pairs}
    total = sum(pixels[scene] for scene, files in finished.items() if files is None)
    if total and batch is None:
        batch = find_batch(model, device)
        batch = team.least("batch", batch) if team else batch
    before = 0
    for number, (scene, record) in enumerate(record_of.items()):
        if (files := finished[scene]) is not None:
            if team is None or team.rank == 0:
                yield Predicted(scene, files, None)
            continue

        def advance(done: int, _: int, scene: Path = scene, before: int = before) -> None:
            if team is not None:
                team.check()
            if progress is not None:
                progress(scene, before + done, total)

        maps = predict_scene(
            model, scene, out, batch=batch or 1, device=device, record=record, progress=advance,
            share=Part(team, f"scene{number}") if team else None, **given,
        )  # fmt: skip
        before += pixels[scene]
        if team is None or team.rank == 0:
            yield Predicted(scene, maps.files, maps.pixels_per_s)


def find_batch(model: SceneModel, device: torch.device) -> int:
    """Windows at once for a device: a power of two, the same each time, so that maps made again are the same bytes.

    On a GPU it is doubled while a forward pass fits into a share of the memory that is free.
    """
    tile = model.tile_size
    if device.type != "cuda":
        return int(min(16, max(1, 1 << (CPU_PIXELS // tile**2).bit_length() - 1))) if tile**2 <= CPU_PIXELS else 1
    limit = GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    batch = 1
    while batch < GPU_WINDOWS and _peak(model, 2 * batch, device) < limit:
        batch *= 2
    torch.cuda.empty_cache()
    return batch


def _peak(model: SceneModel, batch: int, device: torch.device) -> float:
    """Bytes that a forward pass takes; infinite where it does not fit."""
    shape: tuple[Any, ...] = (batch, len(model.bands), model.tile_size, model.tile_size)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.inference_mode():
            model.logits(torch.zeros(shape, device=device))
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return float("inf")
    return torch.cuda.max_memory_allocated(device) - before
