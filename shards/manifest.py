"""The dataset's face: what a reader must know about a folder of shards.

``manifest.json`` is the commit point of a dataset: it is written last and atomically, so a folder without it is
not a dataset. Everything in it is derived from the recipe and the scenes alone, so that its sha256
(:attr:`Dataset.digest`) names the data for good.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shards.errors import AccessError, InputError
from shards.remote import CacheSettings, Store, fetch_index, is_url, open_store

SCHEMA_VERSION = 2
IGNORE = 255
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")  # position = code in the index column `split`
MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassInfo(_Record):
    """One class: its position in ``Manifest.classes`` is its id."""

    name: str
    color: tuple[int, int, int]


class Band(_Record):
    """One image band and its statistics over the valid pixels of the training split (float64 two-pass exact)."""

    name: str
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: dict[str, float]  # "1", "2", "50", "98", "99"


class SplitInfo(_Record):
    """Counts of one split; a tile is labelled when its label has a pixel of a class.

    ``pixels`` has one entry a class; ``ignored`` says why a pixel carries no class. Both count all pixels of the tiles
    of labelled scenes, so that together they are those tiles times the tile's area.
    """

    tiles: int
    labelled: int
    scenes: int
    pixels: list[int]
    ignored: dict[str, int]  # reason (the keys of labels.REASONS) -> pixels


class Labelled(_Record):
    """The nested labelled subsets: share s is the first ``ceil(s * total)`` ranks of the index column
    ``labelled_rank``."""

    seed: int
    by: Literal["tile", "scene"]  # scene: share s is the first ceil(s * scenes) scenes in the order of their ranks
    total: int
    shares: dict[str, int]  # "1/8" -> number of tiles
    missing: dict[str, list[str]]  # "1/8" -> names of the classes that this subset has no pixel of


class Separation(_Record):
    """Protocol block: pixels between the nearest two tiles of different splits of one scene, measured when packed."""

    gap: int
    distances: dict[str, int | None]  # "train-test" -> pixels; null: no scene has tiles of both


class Shard(_Record):
    """One tar file; ``name`` is relative to the dataset folder. A shard holds tiles of one split only."""

    name: str = Field(pattern=r"^shards/(train|val|test)-\d{6,}\.tar$")  # nothing that leads out of the folder
    split: Literal["train", "val", "test"]
    tiles: int
    labelled: int
    bytes: int
    sha256: str


class Manifest(_Record):
    """All of ``manifest.json``. Tiles are ``tile_size`` x ``tile_size`` pixels of ``dtype``, ``len(bands)`` bands."""

    schema_version: int
    tool_version: str
    name: str
    protocol: str  # split protocol of the recipe: "paper", "scene", "block" or "files"
    tile_size: int
    stride: int
    codec: dict[str, str]  # {"image": "geotiff", "label": "geotiff"}
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    bands: list[Band]
    classes: list[ClassInfo]
    ignore_index: int
    scenes: list[str]  # position = index column `scene`
    splits: dict[str, SplitInfo]
    labelled: Labelled
    separation: Separation | None  # of protocol block
    shards: list[Shard]  # position = index column `shard`
    index: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], str]  # column name -> sha256 of its .npy file
    plan_sha256: str

    @property
    def class_names(self) -> list[str]:
        """Class names in id order."""
        return [c.name for c in self.classes]


def parse_share(text: str | float | int | Fraction) -> Fraction:
    """A labelled share such as ``"1/8"``, ``0.125``, ``"12.5%"`` or ``1`` as an exact fraction in (0, 1].

    Raises:
        InputError: when it is no number or lies outside (0, 1].
    """
    raw = str(text).strip()
    try:
        share = Fraction(raw[:-1]) / 100 if raw.endswith("%") else Fraction(raw)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"labelled share {raw!r} is not a number: write 1/8, 0.125, 12.5% or 1") from None
    if not 0 < share <= 1:
        raise InputError(
            f"labelled share {raw} is outside (0, 1]: it is the part of the training tiles whose labels count"
        )
    return share


def share_count(share: Fraction, total: int) -> int:
    """How many labelled tiles a share takes: ``ceil(share * total)``, exact, so that shares nest and none is empty."""
    return math.ceil(share * total)


@dataclass(frozen=True)
class Dataset:
    """A dataset whose manifest has been read and checked.

    Attributes:
        root: the folder of manifest and index; of a remote dataset its part of the node's cache.
        digest: sha256 of manifest.json.
        store: where the shards of a remote dataset come from, None for a folder.
    """

    root: Path
    manifest: Manifest
    digest: str
    store: Store | None = field(default=None, kw_only=True)

    @classmethod
    def open(cls, location: str | Path, cache: CacheSettings | None = None) -> Dataset:
        """Read the manifest of a folder, or of a URL, whose index is fetched then too; ``cache`` is for URLs.

        Raises:
            InputError: when the dataset or its manifest is missing, unreadable or of another schema version.
        """
        if is_url(location):
            store, raw = open_store(str(location), cache or CacheSettings())
            manifest = parse_manifest(raw, f"{store.url}/{MANIFEST}")
            fetch_index(store, manifest.index)
            return cls(store.folder, manifest, hashlib.sha256(raw).hexdigest(), store=store)
        folder = Path(location)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such dataset folder; make one with `dctc shard RECIPE {folder}`")
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except IsADirectoryError:
            raise InputError(f"{path}: is a folder, so this is no dataset") from None
        except FileNotFoundError:
            raise InputError(
                f"{folder}: no {MANIFEST}, so this is no complete dataset; run `dctc shard` again to finish it"
            ) from None
        return cls(folder, parse_manifest(raw, path), hashlib.sha256(raw).hexdigest())

    @property
    def location(self) -> str:
        """Where the dataset lies, as a user names it: URL or folder."""
        return str(self.root) if self.store is None else self.store.url

    def shard_name(self, number: int) -> str:
        """Shard ``number`` as errors name it."""
        return f"{self.location}/{self.manifest.shards[number].name}"

    def open_shard(self, number: int) -> FileIO:
        """Shard ``number``, open for reading; of a remote dataset it is fetched first, and kept until it is closed.

        Raises:
            InputError: when it is missing or cannot be fetched.
        """
        shard = self.manifest.shards[number]
        if self.store is not None:
            return self.store.open_file(shard.name, shard.sha256, shard.bytes)
        try:
            return FileIO(self.root / shard.name)
        except FileNotFoundError:
            raise InputError(f"{self.root / shard.name}: is missing; pack the dataset again with --fresh") from None
        except OSError as error:
            raise AccessError(f"{self.root / shard.name}: cannot be opened ({error.strerror})") from None

    def discard_damaged_shard(self, number: int) -> None:
        """Remove a node's copy of shard ``number`` of a remote dataset if it is damaged; it is then fetched again."""
        shard = self.manifest.shards[number]
        if self.store is not None:
            self.store.discard_damaged(shard.name, shard.sha256)


def parse_manifest(raw: bytes, path: Path | str) -> Manifest:
    """Validate the bytes of a manifest; ``path`` is named in errors."""
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); pack the dataset again") from None
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {version!r}, this dctc reads {SCHEMA_VERSION}; "
            "pack the dataset again with this version"
        )
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: key {key}: {first['msg']}; pack the dataset again") from None


def dump_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest: sorted keys, two-space indent, one final newline."""
    return (json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()


def missing_classes(mask: int, names: Sequence[str]) -> list[str]:
    """Names of the classes whose bit is not set in the bitmask ``mask``."""
    return [name for bit, name in enumerate(names) if not mask >> bit & 1]
