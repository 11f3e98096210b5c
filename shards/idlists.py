"""Lists of tiles or scenes in text files: published splits, and the tiles whose labels come first."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.manifest import SPLITS
from shards.recipe import Recipe
from shards.splits import DROPPED, TRAIN
from shards.stage import Source, source_of


@dataclass(frozen=True)
class IdLists:
    """The lists that a recipe names, and the files that they come from.

    Attributes:
        splits: path of the list, as the recipe has it, by split.
        ids: the ids of each path, in the order of the file.
    """

    splits: Mapping[str, str]
    labelled: str | None
    ids: Mapping[str, Sequence[str]]
    sources: Sequence[Source]


def read_lists(recipe: Recipe, root: Path) -> IdLists:
    """Read ``splits.files`` (for its protocol only) and ``labelled.file``; paths are absolute or relative to ``root``.

    One tile key or scene id a line; blank lines and what follows a # do not count.

    Raises:
        InputError: when a file is missing or no text, or names an id twice.
    """
    files = recipe.splits.files
    splits: dict[str, str] = {name: path for name in SPLITS if (path := getattr(files, name)) is not None}
    splits = splits if recipe.splits.protocol == "files" else {}
    paths = dict.fromkeys([*splits.values(), *([recipe.labelled.file] if recipe.labelled.file else [])])
    ids = {path: _read(root / path) for path in paths}
    return IdLists(splits, recipe.labelled.file, ids, [source_of(root, path) for path in paths])


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of ids ({error})") from None
    ids = [line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line]
    if len(set(ids)) != len(ids):
        twice = next(name for place, name in enumerate(ids) if name in ids[:place])
        raise InputError(f"{path}: names {twice!r} twice")
    return ids


class Members:
    """Which tiles an id stands for: the tile of that key, or all tiles of that scene."""

    def __init__(self, keys: Sequence[str], scene_of: npt.NDArray[np.uint32], scenes: Sequence[str]) -> None:
        self._row = {key: row for row, key in enumerate(keys)}
        order = np.argsort(scene_of, kind="stable")
        ends = np.searchsorted(scene_of[order], np.arange(len(scenes) + 1))
        self._scene = {name: order[ends[k] : ends[k + 1]].tolist() for k, name in enumerate(scenes)}

    def rows(self, name: str, path: str) -> list[int]:
        """Rows of the tiles of an id, ascending.

        Raises:
            InputError: when there is no such tile or scene.
        """
        if name in self._row:
            return [self._row[name]]
        if name in self._scene:
            return list(self._scene[name])
        known = [*self._scene, *self._row]
        near = difflib.get_close_matches(name, known[:20_000], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; ids look like {known[0]!r} or {known[-1]!r}"
        raise InputError(f"{path}: {name!r} is no tile and no scene of this dataset{hint}")


def file_splits(
    recipe: Recipe, lists: IdLists, members: Members, keys: Sequence[str], labelled: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Split code of each tile; what no list names is ``splits.files.rest``, but unlabelled tiles train unless dropped.

    Raises:
        InputError: for an unknown id, a tile in two splits, an unlabelled one in test or val, or a labelled one in no
            list where ``rest`` is error.
    """
    codes = np.full(len(keys), DROPPED, dtype=np.uint8)
    for split, path in lists.splits.items():
        code = SPLITS.index(split)
        for name in lists.ids[path]:
            for row in members.rows(name, path):
                if codes[row] != DROPPED and codes[row] != code:
                    raise InputError(f"{path}: tile {keys[row]!r} also stands in {lists.splits[SPLITS[codes[row]]]}")
                codes[row] = code
    wrong = np.flatnonzero((codes != TRAIN) & (codes != DROPPED) & ~labelled)
    if wrong.size:
        raise InputError(
            f"{lists.splits[SPLITS[codes[wrong[0]]]]}: tile {keys[wrong[0]]!r} has no label and cannot test or validate"
        )
    rest = codes == DROPPED
    if recipe.splits.files.rest == "drop":
        return codes
    open_labelled = np.flatnonzero(rest & labelled)
    if recipe.splits.files.rest == "error" and open_labelled.size:
        raise InputError(
            f"labelled tile {keys[open_labelled[0]]!r} (and {open_labelled.size - 1} more) stands in no list of "
            "splits.files: add it, or set splits.files.rest to train or drop"
        )
    codes[rest] = TRAIN
    return codes
