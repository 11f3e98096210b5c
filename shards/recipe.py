"""What a dataset is: the recipe, a YAML file that says where scenes and labels are and what they mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from shards.errors import InputError
from shards.inputs import IGNORE_WORD, AnyLabel, Image, Mask, Palette, Unlabelled, Vector, names_band
from shards.schema import apply_override, describe, read_yaml
from shards.sections import (
    Bands,
    ClassColor,
    Codec,
    LabelledShares,
    Nodata,
    Section,
    ShardSize,
    Splits,
    Tile,
)

MAX_CLASSES = 64  # one bit a class in the index column `classes`


class Recipe(Section):
    """A whole recipe. ``label: null`` makes a dataset of unlabelled imagery only."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    image: Image
    label: AnyLabel | None = None
    mask: Mask | None = None
    unlabelled: list[Unlabelled] = Field(default=[])
    scene_id: str | None = None  # e.g. "t{tile}_p{part}"; None: the named groups joined with "_"
    bands: Bands
    classes: list[ClassColor] = Field(default=[], max_length=MAX_CLASSES)
    nodata: Nodata = Nodata()
    tile: Tile = Tile()
    splits: Splits
    labelled: LabelledShares = LabelledShares()
    shards: ShardSize = ShardSize()
    codec: Codec = Codec()

    @model_validator(mode="after")
    def _labels_fit_the_classes(self) -> Recipe:
        if self.label is None:
            return self
        if not self.classes:
            raise ValueError("classes is empty: name each class and its colour, or set label to null")
        names = [c.name for c in self.classes]
        if len(set(names)) != len(names):
            raise ValueError("two classes have the same name")
        palette = self.label if isinstance(self.label, Palette) else None
        colors = [c.color for c in self.classes] + (list(palette.ignore_colors) if palette else [])
        if len(set(colors)) != len(colors):
            raise ValueError("a colour stands twice among classes and label.ignore_colors")
        if palette is None:
            self._check_names(names)
        elif palette.threshold is not None and any(channel not in (0, 255) for color in colors for channel in color):
            raise ValueError("label.threshold needs a palette whose channels are all 0 or 255")
        return self

    def _check_names(self, names: list[str]) -> None:
        """The class names that the sections ids and vector mention."""
        if self.label is None:
            return
        if IGNORE_WORD in names:
            raise ValueError(f"a class is named {IGNORE_WORD!r}, which in label.map means no class: name it otherwise")
        for name in self.label.named_classes:
            if name not in [*names, IGNORE_WORD]:
                known = ", ".join([*names, IGNORE_WORD])
                raise ValueError(f"label names the class {name!r}, which classes does not list; known: {known}")
        if isinstance(self.label, Vector):
            if self.label.background == IGNORE_WORD:
                raise ValueError("label.background: leave it out (null) to ignore what lies under no feature")
            if self.label.attribute is None and len([n for n in names if n != self.label.background]) != 1:
                raise ValueError(
                    "label.attribute is null, so every feature is of the one class beside label.background, but there "
                    "are several classes: name the attribute that tells the features' classes"
                )

    @model_validator(mode="after")
    def _extra_imagery_is_stacked_alike(self) -> Recipe:
        for extra in self.unlabelled:
            if any(names_band(pattern) for pattern in extra.pattern) and not self.image.files:
                raise ValueError("unlabelled: the named group 'band' is for stacks: it needs image.files")
        return self

    @property
    def digest(self) -> str:
        """sha256 of all settings, defaults included."""
        return _sha256(self.model_dump(mode="json"))

    @property
    def tile_digest(self) -> str:
        """sha256 of the settings that decide the bytes of a scene's tiles; splits, shares and shard size do not."""
        return _sha256(self.model_dump(mode="json", exclude={"name", "splits", "labelled", "shards"}))


def _sha256(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key.sub=value`` overrides, whose values are YAML.

    Raises:
        InputError: when the file is missing or not YAML, or a key or value is wrong; unknown keys are answered
            with the nearest valid name.
    """
    record = read_yaml(Path(path))
    for override in overrides:
        apply_override(record, override)
    try:
        return Recipe.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error, Recipe)}") from None
