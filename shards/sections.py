"""The sections of a recipe: one model each, with their keys, defaults and the checks that need no other section."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shards.errors import InputError
from shards.manifest import parse_share

Channel = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Channel, Channel, Channel]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bands(Section):
    """Bands to keep, counted from 1 (in a stack over its files), and their names."""

    names: list[str] = Field(min_length=1)
    keep: list[Annotated[int, Field(ge=1)]] = []

    @model_validator(mode="after")
    def _paired(self) -> Bands:
        if self.keep and len(self.keep) != len(self.names):
            raise ValueError(
                f"keep has {len(self.keep)} bands and names has {len(self.names)}: give one name a kept band"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError("two bands have the same name")
        return self

    @property
    def indexes(self) -> list[int]:
        """1-based band numbers in the order in which they are packed."""
        return list(self.keep) or list(range(1, len(self.names) + 1))


class ClassColor(Section):
    """A class; its place in the list is its id."""

    name: str = Field(min_length=1)
    color: Color


class Nodata(Section):
    """Which image pixels carry no data. Pixels that are not finite never do."""

    use_tag: bool = True  # the file's own nodata value, mask band or alpha channel
    value: float | None = None
    match: Literal["all", "any"] = "all"  # a pixel is nodata when all (any) of the kept bands hold the nodata value
    alpha: Annotated[int, Field(ge=1)] | None = None  # number of a band that is 0 where there is no data


class Tile(Section):
    """The windows over a scene, in pixels."""

    size: Annotated[int, Field(ge=8, le=8192)] = 512
    stride: Annotated[int, Field(ge=1)] | None = None  # None: size, tiles do not overlap
    edge: Literal["pad", "shift", "drop"] = "pad"
    min_valid_share: Annotated[float, Field(ge=0, le=1)] = 0.0  # tiles without any valid pixel are always dropped

    @model_validator(mode="after")
    def _covers(self) -> Tile:
        if self.stride is not None and self.stride > self.size:
            raise ValueError(
                f"stride {self.stride} is larger than size {self.size}: pixels between tiles would be lost"
            )
        return self

    @property
    def step(self) -> int:
        """Pixels from one window to the next."""
        return self.stride or self.size


class Shares(Section):
    """Parts that are drawn at random for testing and validation."""

    test_share: Share = 0.1
    val_share: Share = 0.0

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.test_share + self.val_share >= 1:
            raise ValueError("test_share and val_share leave nothing to train on: their sum must be below 1")
        return self


class SceneLists(Shares):
    """Glob patterns of scene ids, looked up in the order test, val, train; without any the shares of scenes count."""

    test: list[str] = []
    val: list[str] = []
    train: list[str] = []
    test_share: Share = 0.2

    @property
    def listed(self) -> bool:
        """Whether scenes are assigned by lists rather than by shares."""
        return bool(self.test or self.val or self.train)


class Blocks(Shares):
    """Squares of ``size`` tiles a side are drawn; ``gap`` pixels at least lie between tiles of different splits."""

    size: Annotated[int, Field(ge=1)] = 4
    gap: Annotated[int, Field(ge=0)] = 0  # 0: they may touch, but not overlap
    test_share: Share = 0.2


class IdFiles(Section):
    """Text files with a tile's key or a scene's id a line; paths are absolute or relative to the root."""

    train: str | None = None
    val: str | None = None
    test: str | None = None
    rest: Literal["train", "drop", "error"] = "error"  # labelled tiles that no file names


class Splits(Section):
    """Which tiles train, validate and test.

    ``paper`` draws tiles, ``scene`` keeps scenes whole, ``block`` draws squares inside scenes, ``files`` takes lists.
    """

    protocol: Literal["paper", "scene", "block", "files"]
    paper: Shares = Shares()
    scene: SceneLists = SceneLists()
    block: Blocks = Blocks()
    files: IdFiles = IdFiles()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _names_files(self) -> Splits:
        if self.protocol == "files" and not (self.files.train or self.files.val or self.files.test):
            raise ValueError("protocol files needs at least one of splits.files.train, .val and .test")
        return self


class LabelledShares(Section):
    """The nested labelled subsets that the manifest records; training may ask for any other share too."""

    shares: list[str] = ["1/16", "1/8", "1/4", "1/2", "1", *(f"{p}%" for p in range(10, 101, 10))]
    by: Literal["tile", "scene"] = "tile"  # scene: whole scenes are drawn
    file: str | None = None  # a list of tiles or scenes that come first, as in splits.files
    seed: int = Field(default=0, ge=0)

    @field_validator("shares", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return [str(share) for share in value] if isinstance(value, list) else value

    @field_validator("shares")
    @classmethod
    def _parse(cls, value: list[str]) -> list[str]:
        for share in value:
            try:
                parse_share(share)
            except InputError as error:
                raise ValueError(str(error)) from None
        return value


class ShardSize(Section):
    """Target size of a shard in MiB; shards of a split hold equal counts of tiles, give or take one."""

    megabytes: Annotated[float, Field(gt=0, le=512)] = 256


class Codec(Section):
    """How a tile becomes bytes."""

    image: Literal["geotiff", "npy", "jpeg", "png"] = "geotiff"
    label: Literal["geotiff", "npy", "png"] = "geotiff"
    quality: Annotated[int, Field(ge=1, le=100)] = 95  # of jpeg, the only lossy one
