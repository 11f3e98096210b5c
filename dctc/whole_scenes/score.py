"""Predict the scenes of a split as ``dctc predict`` does, and hold the maps against the recipe's labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from dctc.bundle import Bundle
from dctc.evaluation.confusion import ConfusionMatrix, Scores
from dctc.evaluation.evaluate import CLUTTER
from dctc.evaluation.model import check_fit, check_net
from dctc.mapping.predict import predict_scene
from dctc.whole_scenes.boundaries import near_boundary
from dctc.whole_scenes.source import open_source
from shards.errors import InputError
from shards.labels import FIRST_REASON
from shards.manifest import IGNORE, SPLITS, Dataset
from shards.reading import open_scene
from shards.recipe import Recipe
from shards.report import read_plan
from shards.scenes import Scene, find_scenes

LONGEST = 1024  # pixels of a picture's longer side; larger scenes are thinned out

Ids = NDArray[np.uint8]


@dataclass(frozen=True)
class SceneScore:
    """One predicted scene.

    Attributes:
        name: the scene's id.
        matrix, eroded: pixels int64 [K,K], rows truth, columns prediction; of all labelled pixels, and of those not
            near a class boundary.
        unpredicted: labelled pixels where the map has no data; they are in neither matrix.
        map, image: files; ``shown``: the image thinned out for a picture, [1 or 3, h, w] at ``picture_places``.
        truth: class ids uint8 [H,W], 255 where there is no label; empty, as ``shown``, once the picture is drawn.
    """

    name: str
    matrix: NDArray[np.int64]
    eroded: NDArray[np.int64]
    unpredicted: int
    map: Path
    image: Path
    shown: NDArray[Any]
    truth: Ids


@dataclass(frozen=True)
class Totals:
    """Scores of one or more scenes: None where no labelled pixel is left."""

    all: Scores | None
    eroded: Scores | None
    unpredicted: int

    @classmethod
    def of(cls, scenes: Sequence[SceneScore], names: Sequence[str]) -> Totals:
        """From the sum of the scenes' confusion matrices, which is exact."""
        sums = [np.sum([getattr(scene, part) for scene in scenes], axis=0) for part in ("matrix", "eroded")]
        scores = [Scores(tuple(names), matrix) if matrix.any() else None for matrix in sums]
        return cls(scores[0], scores[1], sum(scene.unpredicted for scene in scenes))

    def as_record(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """As plain JSON values."""
        parts = {"all": self.all, "eroded": self.eroded}
        return {key: part and part.as_record(without) for key, part in parts.items()} | {
            "unpredicted": self.unpredicted
        }


@dataclass(frozen=True)
class SceneScores:
    """All scenes of a split. ``pictures``: the file of each scene's error map."""

    net: str
    names: list[str]
    scenes: dict[str, Totals]
    total: Totals
    pictures: dict[str, Path]

    @property
    def without(self) -> list[str]:
        """Classes that a second mean leaves out, where they exist."""
        return [name for name in self.names if name == CLUTTER]

    def as_record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "net": self.net,
            "scenes": {name: totals.as_record(self.without) for name, totals in self.scenes.items()},
            "total": self.total.as_record(self.without),
            "pictures": {name: str(path) for name, path in self.pictures.items()},
        }


@dataclass(frozen=True)
class ScenesToScore:
    """The labelled scenes of a split, found again below the root that they were packed from."""

    bundle: Bundle
    recipe: Recipe
    root: Path
    scenes: list[Scene]
    net: str
    tta: bool = False

    @classmethod
    def of(
        cls, bundle: Bundle, dataset: Dataset, split: str, root: Path, net: str | None, tta: bool = False
    ) -> ScenesToScore:
        """Find the rasters of a split.

        Raises:
            InputError: no labelled scene in the split, one that also has tiles in another split, files that are not
                below ``root``, a dataset that does not fit the model, or a net that it has not.
        """
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        check_fit(bundle, dataset)
        check_net(bundle, net)
        plan = read_plan(dataset)
        recipe = Recipe.model_validate(plan["recipe"])
        wanted = [scene for scene in plan["scenes"] if scene["tiles"][split] and scene["labelled"]]
        if not wanted:
            raise InputError(f"{dataset.location}: its {split} split has no labelled scene; choose another --split")
        for scene in wanted:
            others = [name for name in SPLITS if name != split and scene["tiles"][name]]
            if others:
                raise InputError(
                    f"{dataset.location}: scene {scene['id']!r} has tiles in {split} and in {others[0]}, so its map "
                    "cannot be scored as a whole; --scenes is for datasets split by scene (splits.protocol: scene)"
                )
        found = {scene.id: scene for scene in find_scenes(recipe, root)}
        scenes = []
        for record in wanted:
            name = record["id"]
            if name not in found or found[name].label is None:
                raise InputError(f"{root}: has no image and label of scene {name!r}; give --root as for `dctc shard`")
            scenes.append(found[name])
        return cls(bundle, recipe, root, scenes, net or bundle.headline, tta)

    def score(
        self, maps: Path, batch: int, device: torch.device, progress: Callable[[int, int], None] | None = None
    ) -> SceneScores:
        """Predict every scene into the folder ``maps`` and score it; error maps lie in it as ``STEM_errors.png``.

        Memory: two bytes a pixel of the largest scene beside what its prediction takes.
        """
        from dctc.whole_scenes.report import error_picture

        names = [info.name for info in self.bundle.classes]
        scores, pictures = [], {}
        for done, scene in enumerate(self.scenes):
            score = self._score(scene, maps, batch, device)
            pictures[scene.id] = error_picture(score, self.bundle.classes, maps)
            scores.append(_without_truth(score))
            if progress is not None:
                progress(done + 1, len(self.scenes))
        per_scene = {score.name: Totals.of([score], names) for score in scores}
        return SceneScores(self.net, names, per_scene, Totals.of(scores, names), pictures)

    def _score(self, scene: Scene, maps: Path, batch: int, device: torch.device) -> SceneScore:
        with open_source(self.recipe, self.root, scene, self.bundle.dtype) as source:
            outputs = predict_scene(
                self.bundle, source.path, maps, net=self.net, tta=self.tta, batch=batch, device=device, source=source
            )
            shown = source.thinned(*picture_places(source.height, source.width), 3 if len(self.bundle.bands) > 2 else 1)
        truth = read_truth(self.recipe, self.root, scene, self.bundle.tile_size)
        predicted = read_map(outputs.classes)
        missing = predicted == IGNORE
        counted = [self._count(predicted, truth, hidden) for hidden in (missing, missing | near_boundary(truth))]
        unpredicted = int((missing & (truth != IGNORE)).sum())
        return SceneScore(scene.id, counted[0], counted[1], unpredicted, outputs.classes, source.path, shown, truth)

    def _count(self, predicted: Ids, truth: Ids, hidden: NDArray[np.bool_]) -> NDArray[np.int64]:
        confusion = ConfusionMatrix(len(self.bundle.classes))
        for top in range(0, len(truth), 512):
            rows = slice(top, top + 512)
            shown, known, kept = (torch.from_numpy(values[rows]) for values in (predicted, truth, ~hidden))
            confusion.update(shown, known, kept)
        matrix: NDArray[np.int64] = confusion.matrix.numpy().copy()
        return matrix


def picture_places(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of a scene that its picture shows, at equal distances."""
    step = max(1, -(-max(height, width) // LONGEST))
    return np.arange(step // 2, height, step), np.arange(step // 2, width, step)


def _without_truth(score: SceneScore) -> SceneScore:
    """Without what nobody needs once the picture is drawn."""
    return replace(score, truth=score.truth[:0], shown=score.shown[:0])


def read_truth(recipe: Recipe, root: Path, scene: Scene, tile: int) -> Ids:
    """The label of a scene as class ids uint8 [H,W], by all rules of the recipe; 255 where there is none."""
    whole = recipe.tile.model_copy(update={"size": tile, "stride": None, "edge": "pad"})
    with open_scene(recipe.model_copy(update={"tile": whole}), root, scene) as reader:
        truth = np.full((reader.grid.height, reader.grid.width), IGNORE, np.uint8)
        for part in reader.tiles():
            if part.codes is None:
                raise InputError(f"{root}: scene {scene.id!r} has no label any more")
            place = truth[part.window.row : part.window.row + tile, part.window.col : part.window.col + tile]
            codes = part.codes[: place.shape[0], : place.shape[1]]
            place[:] = np.where(codes >= FIRST_REASON, IGNORE, codes)
    return truth


def read_map(path: Path) -> Ids:
    """A map's class ids, uint8 [H,W]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            ids: Ids = file.read(1)
    return ids
