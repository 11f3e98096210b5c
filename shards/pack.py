"""Scenes -> dataset folder: staged scene by scene, planned, assembled shard by shard, committed by the manifest.

Each scene is read once by one task, each shard written once by one task, and every file appears whole or not at all,
so the bytes depend neither on where and by how many workers the tasks run nor on interruptions.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards.assemble import AssembleTask, assemble_shard, is_assembled
from shards.cluster import cluster_engine
from shards.codec import check_codec
from shards.commit import commit, remove_stale
from shards.errors import InputError
from shards.files import remove_temporaries, write_atomic
from shards.headers import check_scenes
from shards.idlists import read_lists
from shards.manifest import MANIFEST, Dataset
from shards.plan import Plan, dump_plan, make_plan
from shards.progress import Meter, Report, Work
from shards.recipe import Recipe
from shards.report import PLAN, PackReport, read_plan, read_report
from shards.scenes import Dtype, Scene, find_scenes, input_files
from shards.stage import StagedScene, StageTask, is_staged, read_staged, source_of, stage_scene
from shards.tar import archive_bytes
from shards.tasks import Engine, local_engine
from shards.verify import verify as find_damage

STAGING = ".staging"
PREVIEW = "preview.png"  # a contact sheet for people; no reader needs it

Task = TypeVar("Task")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Packed(Dataset):
    """A dataset that has just been packed, and what there is to say about it."""

    report: PackReport


def pack(
    recipe: Recipe,
    root: Path,
    out: Path,
    *,
    workers: int = 1,
    dask: str | None = None,
    resume: bool = True,
    verify: bool = False,
    progress: Report | None = None,
) -> Packed:
    """Pack the scenes below ``root`` into the dataset folder ``out``.

    ``workers`` processes of this machine do it, or with ``dask`` the cluster of the scheduler at that address, all of
    whose machines must see both folders. With ``resume`` scenes and shards that an interrupted run has finished are
    kept, and a finished dataset of the same recipe and inputs is left as it is; without it ``out`` is emptied first.
    ``verify`` re-reads and re-hashes what is kept instead of trusting sizes and times. Staging needs about as much room
    in ``out`` as the dataset itself.

    Raises:
        InputError: when the scenes, the recipe, the output folder, the room on its disk or the cluster do not allow
            it. No manifest is left then; what is finished is kept for the next run.
    """
    root, out = Path(root), Path(out)
    if dask is not None:
        root, out = root.absolute(), out.absolute()  # workers run in other folders
    scenes = find_scenes(recipe, root)
    dtype = check_scenes(recipe, root, scenes)
    check_codec(recipe.codec.image, dtype, len(recipe.bands.names))
    if out.resolve() == root.resolve():
        raise InputError(f"{out}: is the folder of the scenes; give the dataset a folder of its own")
    if resume and (out / MANIFEST).exists():
        return _finished(recipe, root, out, scenes, verify)
    staging = out / STAGING
    _make_folders(out, staging)
    with _room_in(out), _only_writer(staging):
        _sweep(out)
        if not resume:
            _clear(out)
        seen = [root / file for file in scenes[0].files]
        try:
            with local_engine(workers) if dask is None else cluster_engine(dask, staging, seen) as engine:
                stage = [StageTask(recipe, root, staging, scene) for scene in scenes]
                plan, shards = _write(engine, dtype, stage, out, verify, progress or (lambda state: None))
        finally:
            _sweep(out)  # of workers that were stopped, or that a cluster has lost on the way
        commit(plan, shards, out)
    # A worker that its cluster has cut off may still write there; the next run would clear that away.
    shutil.rmtree(staging, ignore_errors=dask is not None)
    return _packed(out)


def _write(
    engine: Engine, dtype: Dtype, stage: Sequence[StageTask], out: Path, verify: bool, report: Report
) -> tuple[Plan, list[AssembleTask]]:
    """Stage what is not staged, plan, and write the shards that are not written."""
    unstaged = [task for task in stage if not is_staged(task, verify)]
    _run(engine, "stage", stage_scene, unstaged, len(stage), _source_bytes, report)
    plan = make_plan(
        stage[0].recipe, dtype, [_staged(task) for task in stage], read_lists(stage[0].recipe, stage[0].root)
    )
    plan_bytes = dump_plan(plan)
    write_atomic(out / PLAN, plan_bytes)
    shards = _assemble_tasks(plan, out, stage[0].staging, hashlib.sha256(plan_bytes).hexdigest())
    unwritten = [task for task in shards if not is_assembled(task, verify)]
    _check_room(out, unwritten)
    _run(engine, "assemble", assemble_shard, unwritten, len(shards), _tiles, report)
    return plan, shards


def _packed(out: Path) -> Packed:
    dataset = Dataset.open(out)
    return Packed(dataset.root, dataset.manifest, dataset.digest, read_report(dataset))


def _run(
    engine: Engine,
    step: str,
    function: Callable[[Task], Work],
    tasks: Sequence[Task],
    total: int,
    weigh: Callable[[Task], float],
    report: Report,
) -> None:
    meter = Meter(step, total, total - len(tasks), sum(map(weigh, tasks)), report)
    engine.run(function, tasks, lambda task, work: meter.add(work, weigh(task)))


def _source_bytes(task: StageTask) -> float:
    return sum((task.root / file).stat().st_size for file in task.scene.files)


def _tiles(task: AssembleTask) -> float:
    return len(task.tiles)


@contextmanager
def _room_in(out: Path) -> Iterator[None]:
    """Say clearly that the disk is full, wherever that is noticed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise InputError(
            f"{out}: no more can be written ({error.strerror}, {_mebibytes(shutil.disk_usage(out).free)} free on its "
            "disk). Packing needs twice the size of the dataset, for staged tiles and for shards. What is finished is "
            "kept: make room and run the same command again"
        ) from None


def _check_room(out: Path, tasks: Sequence[AssembleTask]) -> None:
    """Refuse to begin with shards that will not fit; how large they will be is known by now."""
    needed = sum(archive_bytes(blob.size for _, _, tile in task.tiles for _, blob in tile.members) for task in tasks)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise InputError(
            f"{out}: no room for the shards, which need {_mebibytes(needed)} while its disk has {_mebibytes(free)} "
            "free. The staged scenes are kept: make room and run the same command again"
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _make_folders(out: Path, staging: Path) -> None:
    try:
        if out.is_dir() and any(out.iterdir()) and not (staging.is_dir() or (out / MANIFEST).is_file()):
            raise InputError(f"{out}: holds other files; give the dataset a folder of its own")
        for folder in (staging, out / "shards", out / "index"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a dataset folder ({error.strerror})") from None


@contextmanager
def _only_writer(staging: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back however this process ends."""
    with (staging / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{staging.parent}: another `dctc shard` is at work there; wait for it or stop it"
            ) from None
        except OSError as error:
            raise InputError(
                f"{staging.parent}: its file system cannot lock files ({error.strerror}), which keeps two writers "
                "apart; give a folder on another one"
            ) from None
        yield


def _sweep(out: Path) -> None:
    for folder in (out, out / STAGING, out / "shards", out / "index"):
        remove_temporaries(folder)


def _clear(out: Path) -> None:
    (out / MANIFEST).unlink(missing_ok=True)  # first: from here on it is no dataset
    (out / PLAN).unlink(missing_ok=True)
    (out / PREVIEW).unlink(missing_ok=True)
    remove_stale(out, keep=())
    for file in (out / STAGING).iterdir():
        if file.name != "lock":
            file.unlink()


def _finished(recipe: Recipe, root: Path, out: Path, scenes: Sequence[Scene], verify: bool) -> Packed:
    """The dataset that is there already, if this recipe and these inputs would give the same one."""
    packed = _packed(out)
    plan = read_plan(packed)
    there = {entry["path"]: entry["sha256"] for scene in plan["scenes"] for entry in scene["inputs"]}
    there |= {entry["path"]: entry["sha256"] for entry in plan["lists"]}
    lists = read_lists(recipe, root).sources
    here = list(dict.fromkeys(path for scene in scenes for path in input_files(root, scene)))
    here += [source.path for source in lists]
    changed = sorted(there.keys() ^ set(here)) or [p for p in here if source_of(root, p).sha256 != there[p]]
    if plan["recipe_sha256"] != recipe.digest or changed:
        why = f"{changed[0]} is not as it was" if changed else "another recipe made it"
        raise InputError(f"{out}: holds a finished dataset and {why}; --fresh replaces it, or give another folder")
    damage = find_damage(out) if verify else _misfits(packed)
    if damage:
        raise InputError(f"{out}: the dataset is damaged ({'; '.join(damage)}); --fresh packs it again")
    # Of a run that ended between its commit and its cleaning up, or while it drew the contact sheet.
    shutil.rmtree(out / STAGING, ignore_errors=True)
    remove_temporaries(out)
    return packed


def _misfits(dataset: Dataset) -> list[str]:
    """Shards that are missing or of another size, one sentence each: what can be told without reading them."""
    found = ((shard, dataset.root / shard.name) for shard in dataset.manifest.shards)
    return [
        f"{path} is {'of another size' if path.is_file() else 'missing'}"
        for shard, path in found
        if not path.is_file() or path.stat().st_size != shard.bytes
    ]


def _staged(task: StageTask) -> StagedScene:
    staged = read_staged(task.sidecar)
    if staged is None:
        raise InputError(f"{task.sidecar}: vanished while packing; run `dctc shard` again")
    return staged


def _assemble_tasks(plan: Plan, out: Path, staging: Path, plan_sha256: str) -> list[AssembleTask]:
    return [
        AssembleTask(
            out=out,
            staging=staging,
            name=shard.name,
            plan_sha256=plan_sha256,
            codec=plan.recipe.codec,
            dtype=plan.dtype,
            bands=len(plan.recipe.bands.names),
            tile_size=plan.recipe.tile.size,
            statistics=shard.split == "train",
            tiles=[(i, plan.scenes[plan.scene_of[i]].scene, plan.tiles[i]) for i in shard.tiles],
        )
        for shard in plan.shards
    ]
