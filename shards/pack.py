"""Scenes -> dataset folder: staged scene by scene, planned, assembled shard by shard, committed by the manifest.

Each scene is read once by one task, each shard written once by one task, and every file appears whole or not at all,
so the bytes depend neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.assemble import AssembleTask, assemble_shard, is_assembled
from shards.commit import commit, remove_stale
from shards.errors import InputError
from shards.files import write_atomic
from shards.headers import check_scenes
from shards.manifest import MANIFEST, Dataset
from shards.plan import Plan, dump_plan, make_plan
from shards.recipe import Recipe
from shards.report import PLAN, PackReport, read_plan, read_report
from shards.scenes import Scene, find_scenes, input_files
from shards.stage import StagedScene, StageTask, is_staged, read_staged, source_of, stage_scene
from shards.tasks import run_tasks
from shards.verify import verify as find_damage

STAGING = ".staging"

Progress = Callable[[str, int, int], None]  # step ("stage" or "assemble"), items finished, items in all


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
    resume: bool = True,
    verify: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Pack the scenes below ``root`` into the dataset folder ``out``.

    With ``resume`` scenes and shards that an interrupted run has finished are kept, and a finished dataset of the same
    recipe and inputs is left as it is; without it ``out`` is emptied first. ``verify`` re-reads and re-hashes what is
    kept instead of trusting sizes and times. Staging needs about as much room in ``out`` as the dataset itself.

    Raises:
        InputError: when the scenes, the recipe or the output folder do not allow it. No manifest is left then.
    """
    root, out = Path(root), Path(out)
    scenes = find_scenes(recipe, root)
    dtype = check_scenes(recipe, root, scenes)
    if out.resolve() == root.resolve():
        raise InputError(f"{out}: is the folder of the scenes; give the dataset a folder of its own")
    if resume and (out / MANIFEST).exists():
        return _finished(recipe, root, out, scenes, verify)
    staging = out / STAGING
    _make_folders(out, staging)
    with _only_writer(staging):
        if not resume:
            _clear(out)
        report = progress or (lambda step, done, total: None)
        stage = [StageTask(recipe, root, staging, scene) for scene in scenes]
        _run(stage_scene, [task for task in stage if not is_staged(task, verify)], len(stage), "stage", workers, report)
        plan = make_plan(recipe, dtype, [_staged(task) for task in stage])
        plan_bytes = dump_plan(plan)
        write_atomic(out / PLAN, plan_bytes)
        shards = _assemble_tasks(plan, out, staging, hashlib.sha256(plan_bytes).hexdigest())
        _run(
            assemble_shard, [t for t in shards if not is_assembled(t, verify)], len(shards), "assemble", workers, report
        )
        commit(plan, shards, out)
    shutil.rmtree(staging)
    return _packed(out)


def _packed(out: Path) -> Packed:
    dataset = Dataset.open(out)
    return Packed(dataset.root, dataset.manifest, dataset.digest, read_report(dataset))


def _run(
    function: Callable[[Any], object], tasks: Sequence[Any], total: int, step: str, workers: int, progress: Progress
) -> None:
    kept = total - len(tasks)
    progress(step, kept, total)
    run_tasks(function, tasks, workers, lambda done: progress(step, kept + done, total))


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
        except OSError:
            raise InputError(
                f"{staging.parent}: another `dctc shard` is at work there; wait for it or stop it"
            ) from None
        yield


def _clear(out: Path) -> None:
    (out / MANIFEST).unlink(missing_ok=True)  # first: from here on it is no dataset
    (out / PLAN).unlink(missing_ok=True)
    remove_stale(out, keep=())
    for file in (out / STAGING).iterdir():
        if file.name != "lock":
            file.unlink()


def _finished(recipe: Recipe, root: Path, out: Path, scenes: Sequence[Scene], verify: bool) -> Packed:
    """The dataset that is there already, if this recipe and these inputs would give the same one."""
    packed = _packed(out)
    plan = read_plan(packed)
    there = {entry["path"]: entry["sha256"] for scene in plan["scenes"] for entry in scene["inputs"]}
    here = list(dict.fromkeys(path for scene in scenes for path in input_files(root, scene)))
    changed = sorted(there.keys() ^ set(here)) or [p for p in here if source_of(root, p).sha256 != there[p]]
    if plan["recipe_sha256"] != recipe.digest or changed:
        why = f"{changed[0]} is not as it was" if changed else "another recipe made it"
        raise InputError(f"{out}: holds a finished dataset and {why}; --fresh replaces it, or give another folder")
    damage = find_damage(out) if verify else []
    if damage:
        raise InputError(f"{out}: the dataset is damaged ({'; '.join(damage)}); --fresh packs it again")
    shutil.rmtree(out / STAGING, ignore_errors=True)  # of a run that ended between its commit and its cleaning up
    return packed


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
            dtype=plan.dtype,
            bands=len(plan.recipe.bands.names),
            statistics=shard.split == "train",
            tiles=[(i, plan.scenes[plan.scene_of[i]].scene, plan.tiles[i]) for i in shard.tiles],
        )
        for shard in plan.shards
    ]
