"""The sections of a recipe that say where scenes come from and what their labels mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from shards.sections import Channel, Color, Section

IGNORE_WORD = "ignore"  # in a map: no class; so no class of a mapped label may have this name
BAND_GROUP = "band"  # the named group that tells the files of a stack apart

FatalShare = Annotated[float, Field(ge=0, le=1)]


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression ({error})") from None


def _regex(text: str) -> str:
    _compiled(text)
    return text


def _named(patterns: list[str]) -> list[str]:
    for text in patterns:
        if not set(_compiled(text).groupindex) - {BAND_GROUP}:
            raise ValueError(
                f"{text!r} has no named group such as (?P<scene>...): the groups name the scene and pair its files"
            )
    return patterns


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


AnyPatterns = Annotated[list[Annotated[str, AfterValidator(_regex)]], Field(min_length=1), BeforeValidator(_as_list)]
Patterns = Annotated[AnyPatterns, AfterValidator(_named)]


def names_band(pattern: str) -> bool:
    """Whether a pattern tells the files of a stack apart."""
    return BAND_GROUP in re.compile(pattern).groupindex


class Image(Section):
    """Where the images are: regular expressions that match a file's whole path relative to the root.

    With ``files`` an image is a stack of single-band files: the pattern's group ``band`` (no part of the scene's id)
    must take these values, in whose order the bands are stacked.
    """

    pattern: Patterns
    files: list[str] = Field(default=[])
    resampling: Literal["nearest", "bilinear", "cubic", "average"] | None = None  # of files on another grid

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("files"), list):
            return value | {"files": [str(file) for file in value["files"]]}  # band numbers are written as numbers
        return value

    @model_validator(mode="after")
    def _stacked(self) -> Image:
        if len(set(self.files)) != len(self.files):
            raise ValueError("files names a file twice")
        for pattern in self.pattern:
            if names_band(pattern) != bool(self.files):
                raise ValueError(
                    f"files and the named group {BAND_GROUP!r} go together: give files the values of the group in the "
                    f"order of the bands, and each pattern the group (here {pattern!r})"
                )
        if self.resampling is not None and not self.files:
            raise ValueError("resampling is for stacks: it needs files")
        return self


class Unlabelled(Section):
    """More imagery of the same bands, below a folder of its own; all of it is unlabelled training data."""

    folder: str = Field(min_length=1)  # absolute, or relative to the root
    pattern: Patterns  # of the path relative to the folder
    scene_id: str | None = None


class Mask(Section):
    """Single-band rasters on the images' grids that say which pixels do not count."""

    pattern: Patterns
    ignore: Literal["zero", "nonzero"] = "zero"  # which of its pixels do not count
    applies_to: Literal["label", "image"] = "label"  # image: the pixel has no data at all


class Palette(Section):
    """Colour masks. Distances between colours are the largest difference of a channel (0..255)."""

    pattern: Patterns
    kind: Literal["palette"] = "palette"
    tolerance: Channel = 0
    threshold: Channel | None = None  # channels above it count as 255, the others as 0, before the palette is looked up
    ignore_colors: list[Color] = Field(default=[])
    max_unmatched_share: FatalShare = 0.01  # of a scene's label pixels
    check_grid: bool = True  # refuse a label whose georeference disagrees with its image's
    resampling: Literal["nearest"] | None = None  # of labels on another grid than their image's

    @property
    def named_classes(self) -> list[str]:
        """Class names that this section mentions."""
        return []


def _texts_of_map(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {value_text(key): target for key, target in value.items()}


def value_text(value: Any) -> str:
    """One spelling for an attribute's value however the file or YAML types it: 1, 1.0 and "1" are "1", true "true"."""
    if value is None or value != value:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


class Ids(Section):
    """Single-band rasters whose pixels hold numbers of classes, as integers of any type or as floats."""

    pattern: Patterns
    kind: Literal["ids"]
    map: dict[int, str] | None = None  # value -> class name or "ignore"; None: the value is the class's place
    nodata: float | None = None  # counts instead of the file's own nodata value
    max_unmatched_share: FatalShare = 0.01  # of a scene's label pixels
    check_grid: bool = True
    resampling: Literal["nearest", "mode"] | None = None

    @model_validator(mode="after")
    def _sound(self) -> Ids:
        if self.map is not None and self.nodata is not None and self.nodata in self.map:
            raise ValueError(f"{self.nodata:g} stands in map and is nodata: leave one of them out")
        return self

    @property
    def named_classes(self) -> list[str]:
        """Class names that this section mentions."""
        return list((self.map or {}).values())


class Vector(Section):
    """Vector files whose features are drawn onto the images' grids, later ones over earlier ones."""

    pattern: AnyPatterns  # without any named group: one file for all scenes
    kind: Literal["vector"]
    layer: str | None = None  # None: the only layer
    attribute: str | None = None  # None: every feature is of the one class that is not the background
    map: Annotated[dict[str, str] | None, BeforeValidator(_texts_of_map)] = None  # None: values are class names
    all_touched: bool = False  # False: pixels whose centre lies inside; True: every pixel that is touched
    background: str | None = None  # class of the pixels under no feature; None: they are ignored
    max_unmatched_share: FatalShare = 0.01  # of a scene's features

    @model_validator(mode="after")
    def _sound(self) -> Vector:
        groups = [bool(re.compile(text).groupindex) for text in self.pattern]
        if any(groups) and not all(groups):
            raise ValueError(
                "pattern: either each has a named group such as (?P<scene>...), a file for each scene, or none has, "
                "one file for all scenes"
            )
        if self.map is not None and self.attribute is None:
            raise ValueError("map needs attribute, whose values it names")
        return self

    @property
    def shared(self) -> bool:
        """Whether one file holds the features of all scenes."""
        return not re.compile(self.pattern[0]).groupindex

    @property
    def named_classes(self) -> list[str]:
        """Class names that this section mentions."""
        return [*(self.map or {}).values(), *([self.background] if self.background is not None else [])]


Label = Palette | Ids | Vector


def _with_kind(value: Any) -> Any:
    return {"kind": "palette", **value} if isinstance(value, dict) else value


AnyLabel = Annotated[Annotated[Label, Field(discriminator="kind")], BeforeValidator(_with_kind)]
