"""Find the files of a dataset and pair them to scenes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.errors import InputError
from shards.inputs import BAND_GROUP, Unlabelled, Vector, names_band
from shards.rasters import open_raster
from shards.recipe import Recipe

Dtype = Literal["uint8", "uint16", "int16", "float32"]

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_ID = 64  # keys are names in USTAR archives: 100 bytes with offsets and suffix
_SHAPEFILE = (".shx", ".dbf", ".prj", ".cpg", ".qpj", ".qix", ".sbn", ".sbx")  # what GDAL reads beside a .shp


@dataclass(frozen=True)
class Scene:
    """An image and what belongs to it; paths are POSIX paths relative to the root, or absolute outside of it."""

    id: str
    images: tuple[str, ...]  # one file, or the files of a stack in the order of their bands
    label: str | None
    mask: str | None = None
    vector: bool = False  # whether the label is a file of features, maybe of several scenes
    extra: bool = False  # of an unlabelled folder: training data whatever the splits say

    @property
    def image(self) -> str:
        """The first image file, whose grid is the scene's."""
        return self.images[0]

    @property
    def rasters(self) -> list[str]:
        """All rasters: images, label, mask."""
        label = [self.label] if self.label is not None and not self.vector else []
        return [*self.images, *label, *([self.mask] if self.mask is not None else [])]

    @property
    def files(self) -> list[str]:
        """All files that were paired: images, then label and mask where there are any."""
        rest = [path for path in (self.label, self.mask) if path is not None]
        return [*self.images, *rest]


def find_scenes(recipe: Recipe, root: Path) -> list[Scene]:
    """All scenes below ``root`` and in the folders of unlabelled imagery, sorted by id.

    A file that matches a label pattern is a label, whatever else it matches; then come masks, then images.

    Raises:
        InputError: when a folder is missing or holds no file of its pattern, two files claim one place in a scene, a
            file of a stack is missing, or a label or mask has no image.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder of scenes; give the right one with --root")
    files = sorted(_walk(root))
    labels, shared = _labels(recipe, root, files)
    taken = {shared, *labels.values()}
    masks = _masks(recipe, [file for file in files if file not in taken])
    taken |= set(masks.values())
    rest = [file for file in files if file not in taken]
    images = _images(recipe.image.pattern, recipe.image.files, rest, recipe.scene_id, root)
    if not images:
        seen = f"it holds e.g. {files[0]}" if files else "it holds no files"
        raise InputError(f"{root}: no file matches the image pattern {recipe.image.pattern[0]!r}; {seen}")
    if recipe.label is not None:
        _some(shared or labels, "label", recipe.label.pattern, root, "set label to null for imagery without any")
    if recipe.mask is not None:
        _some(masks, "mask", recipe.mask.pattern, root, "leave mask out if there are none")
    _no_orphans("label", labels, images, root)
    _no_orphans("mask", masks, images, root)
    vector = isinstance(recipe.label, Vector)
    scenes = {
        scene: Scene(scene, paths, labels.get(scene, shared), masks.get(scene), vector)
        for scene, paths in images.items()
    }
    for extra in recipe.unlabelled:
        for scene, paths in _extra_images(recipe, extra, root).items():
            _no_clash(scenes, scene, paths, root)
            scenes[scene] = Scene(scene, paths, None, extra=True)
    return [scene for _, scene in sorted(scenes.items())]


def _labels(recipe: Recipe, root: Path, files: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """Scene id -> label, and the one label file of all scenes where the recipe wants that."""
    label = recipe.label
    if label is None:
        return {}, None
    if not (isinstance(label, Vector) and label.shared):
        return _single(_claim(files, label.pattern, recipe.scene_id, "labels")), None
    patterns = [re.compile(pattern) for pattern in label.pattern]
    matching = [file for file in files if any(pattern.fullmatch(file) for pattern in patterns)]
    if len(matching) > 1:
        raise InputError(
            f"{root}: {matching[0]} and {matching[1]} both match the label pattern {label.pattern[0]!r}, which has no "
            "named group and so means one file for all scenes: make it more exact, or pair files by (?P<scene>...)"
        )
    return {}, matching[0] if matching else None


def _masks(recipe: Recipe, files: Sequence[str]) -> dict[str, str]:
    if recipe.mask is None:
        return {}
    return _single(_claim(files, recipe.mask.pattern, recipe.scene_id, "masks"))


def _some(found: object, what: str, patterns: Sequence[str], root: Path, otherwise: str) -> None:
    if not found:
        raise InputError(f"{root}: no file matches the {what} pattern {patterns[0]!r}; correct it, or {otherwise}")


def _single(claimed: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {scene: next(iter(files.values())) for scene, files in claimed.items()}


def _images(
    patterns: Sequence[str], bands: Sequence[str], files: Sequence[str], template: str | None, root: Path
) -> dict[str, tuple[str, ...]]:
    """Scene id -> image files: one, or those of ``bands`` in their order."""
    claimed = _claim(files, patterns, template, "images", stacked=bool(bands))
    if not bands:
        return {scene: (file,) for scene, file in _single(claimed).items()}
    images = {}
    for scene, by_band in claimed.items():
        there = {band: file for band, file in by_band.items() if band in bands}
        for band in bands if there else ():
            if band not in there:
                raise InputError(
                    f"{root}: scene {scene!r} lacks the file of {band!r}, which image.files names, beside "
                    f"{next(iter(there.values()))}: add it or remove the scene's other files"
                )
        if there:
            images[scene] = tuple(there[band] for band in bands)
    return images


def _extra_images(recipe: Recipe, extra: Unlabelled, root: Path) -> dict[str, tuple[str, ...]]:
    folder = root / extra.folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; unlabelled.folder is absolute or relative to --root")
    bands = recipe.image.files if names_band(extra.pattern[0]) else []
    images = _images(extra.pattern, bands, sorted(_walk(folder)), extra.scene_id, folder)
    _some(images, "unlabelled", extra.pattern, folder, "remove the entry")
    start = Path(os.path.normpath(extra.folder))
    return {scene: tuple((start / path).as_posix() for path in paths) for scene, paths in images.items()}


def _no_clash(scenes: Mapping[str, Scene], scene: str, paths: tuple[str, ...], root: Path) -> None:
    if scene in scenes:
        raise InputError(
            f"scene {scene!r} stands twice, {scenes[scene].image} and {paths[0]}: give the unlabelled folder a "
            "scene_id of its own, as 'extra-{scene}'"
        )
    here = {(root / path).resolve() for path in paths}
    for other in scenes.values():
        if here & {(root / path).resolve() for path in other.images}:
            raise InputError(
                f"{root / paths[0]}: is scene {other.id!r} and, by unlabelled, scene {scene!r} too: make the patterns "
                "more exact"
            )


def _no_orphans(what: str, found: Mapping[str, str], images: Mapping[str, object], root: Path) -> None:
    orphans = sorted(found.keys() - images.keys())
    if orphans:
        more = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 else ""
        raise InputError(
            f"{root / found[orphans[0]]}: {what} of scene {orphans[0]!r} without its image{more}; "
            f"add the image, remove the {what} or correct the patterns"
        )


def input_files(root: Path, scene: Scene) -> list[str]:
    """All files that a scene is read from, world files and other sidecars included, relative to the root.

    Raises:
        InputError: when one of its rasters cannot be opened.
    """
    files: list[str] = []
    for path in scene.rasters:
        with open_raster(root / path) as source:
            files += [path, *sorted(_relative(Path(file), root) for file in source.files)]
    if scene.vector and scene.label is not None:
        files += [scene.label, *_vector_sidecars(root, scene.label)]
    return list(dict.fromkeys(files))


def _relative(file: Path, root: Path) -> str:
    """As paths of scenes are written: below the root relative to it, elsewhere as the recipe names the folder."""
    return Path(os.path.relpath(file, root)).as_posix() if file.is_relative_to(root) else file.as_posix()


def _vector_sidecars(root: Path, path: str) -> list[str]:
    file = Path(path)
    if file.suffix.lower() != ".shp":
        return []
    beside = (root / file.parent).iterdir()
    names = sorted(p.name for p in beside if p.stem == file.stem and p.suffix.lower() in _SHAPEFILE)
    return [(file.parent / name).as_posix() for name in names]


def _walk(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _claim(
    files: Sequence[str], patterns: Sequence[str], template: str | None, what: str, stacked: bool = False
) -> dict[str, dict[str, str]]:
    """Scene id -> value of the group ``band`` (empty unless ``stacked``) -> file, for the files that match."""
    compiled = [re.compile(pattern) for pattern in patterns]
    found: dict[str, dict[str, str]] = {}
    for file in files:
        match = next((m for m in (pattern.fullmatch(file) for pattern in compiled) if m), None)
        if match is None:
            continue
        groups = {name: text or "" for name, text in match.groupdict().items()}
        band = groups.pop(BAND_GROUP, "") if stacked else ""
        scene = _scene_id(file, groups, template)
        claimed = found.setdefault(scene, {})
        if band in claimed:
            of = f" of {band!r}" if band else ""
            raise InputError(
                f"scene {scene!r} has two {what}{of}, {claimed[band]} and {file}: make the pattern more exact"
            )
        claimed[band] = file
    return found


def _scene_id(file: str, groups: Mapping[str, str], template: str | None) -> str:
    if template is None:
        raw = "_".join(groups.values())
    else:
        try:
            raw = template.format(**groups)
        except (KeyError, IndexError, ValueError):
            known = ", ".join(groups)
            raise InputError(f"scene_id {template!r} does not fit the named groups of the pattern: {known}") from None
    scene = _UNSAFE.sub("-", raw)
    if not 0 < len(scene) <= _LONGEST_ID:
        raise InputError(f"{file}: scene id {scene!r} must have 1 to {_LONGEST_ID} characters: set scene_id")
    return scene
