"""What a dataset is: the recipe, a YAML file that says where scenes and labels are and what they mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from shards.errors import InputError
from shards.schema import apply_override, describe, read_yaml
from shards.sections import (
    Bands,
    ClassColor,
    Codec,
    Image,
    LabelledShares,
    Nodata,
    Palette,
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
    label: Palette | None = None
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
    def _palette_is_sound(self) -> Recipe:
        if self.label is None:
            return self
        if not self.classes:
            raise ValueError("classes is empty: name each class and its colour, or set label to null")
        if len({c.name for c in self.classes}) != len(self.classes):
            raise ValueError("two classes have the same name")
        colors = [c.color for c in self.classes] + list(self.label.ignore_colors)
        if len(set(colors)) != len(colors):
            raise ValueError("a colour stands twice among classes and label.ignore_colors")
        if self.label.threshold is not None and any(channel not in (0, 255) for color in colors for channel in color):
            raise ValueError("label.threshold needs a palette whose channels are all 0 or 255")
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
