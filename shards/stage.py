"""Read one scene once and stage its encoded tiles.

``STAGING/SCENE.tiles`` holds the members of all tiles one after another and ``STAGING/SCENE.json``, written last,
says what lies where. Both are pure functions of the recipe and of the scene's files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import rasterio
from pydantic import BaseModel, ConfigDict, ValidationError
from rasterio.transform import Affine
from zlib_ng import zlib_ng

from shards.bandstats import histogram
from shards.codec import LOSSY, encode_image, encode_label, encode_mask, encoder_versions, holds_mask
from shards.errors import InputError
from shards.files import atomic_file, write_atomic
from shards.labels import FIRST_REASON, REASONS
from shards.manifest import IGNORE
from shards.progress import Work
from shards.rasters import place_of
from shards.reading import LabelCount, SceneReader, Tile, open_scene
from shards.recipe import Recipe
from shards.scenes import Scene, input_files
from shards.tiling import Window

STAGING_VERSION = "3"  # raise it when tiles are encoded or recorded otherwise: nothing staged before is then used
CACHE_MB = 64  # of decoded source blocks, in each process


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Blob(_Record):
    """Bytes inside the .tiles file."""

    offset: int
    size: int
    crc32: int


class StagedTile(_Record):
    """One encoded tile; ``classes`` has bit k set when class k has a pixel."""

    key: str
    row: int  # of the window in the scene
    col: int
    valid_share: float
    classes: int
    pixels: list[int]
    ignored: dict[str, int]
    histogram: Blob | None = None  # uint8 that is stored as it is: int32 [C,256] of the valid pixels
    image: Blob
    mask: Blob | None = None  # only where the image's codec holds no mask and the tile is not wholly valid
    label: Blob | None
    meta: Blob

    @property
    def members(self) -> list[tuple[str, Blob]]:
        """What there is, by name, in the order in which it stands in a shard."""
        blobs = {"image": self.image, "mask": self.mask, "label": self.label, "meta": self.meta}
        return [(name, blob) for name, blob in blobs.items() if blob is not None]


class Source(_Record):
    """An input file; ``mtime_ns`` only spares a second hashing."""

    path: str
    bytes: int
    sha256: str
    mtime_ns: int


class StagedScene(_Record):
    """The sidecar of a staged scene."""

    scene: str
    labelled: bool
    extra: bool  # of an unlabelled folder: training data whatever the splits say
    digest: str  # of everything but the inputs that decides the tiles' bytes
    sources: list[Source]
    size: int  # bytes of the .tiles file
    height: int
    width: int
    crs: str | None  # WKT
    transform: list[float]  # a, b, c, d, e, f
    label: LabelCount | None
    empty: int  # windows without a valid pixel, which are not staged
    tiles: list[StagedTile]


@dataclass(frozen=True)
class StageTask:
    """All that a worker needs to stage one scene."""

    recipe: Recipe
    root: Path
    staging: Path
    scene: Scene

    @property
    def tiles_file(self) -> Path:
        """The members of all tiles."""
        return self.staging / f"{self.scene.id}.tiles"

    @property
    def sidecar(self) -> Path:
        """The commit point of the staged scene."""
        return self.staging / f"{self.scene.id}.json"

    @property
    def digest(self) -> str:
        """Names everything but the inputs that decides the bytes of the tiles, the encoder included."""
        encoder = [STAGING_VERSION, importlib.metadata.version("dctc"), *encoder_versions(self.recipe.codec.image)]
        parts = [self.recipe.tile_digest, self.scene.id, *self.scene.files, *encoder]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def source_of(root: Path, path: str) -> Source:
    """Size and sha256 of an input file, read in pieces."""
    try:
        with (root / path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            stat = (root / path).stat()
    except OSError as error:
        raise InputError(f"{root / path}: cannot be read ({error.strerror})") from None
    return Source(path=path, bytes=stat.st_size, sha256=digest, mtime_ns=stat.st_mtime_ns)


def read_staged(path: Path) -> StagedScene | None:
    """A sidecar, or None when there is none that can be read."""
    try:
        return StagedScene.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def is_staged(task: StageTask, verify: bool) -> bool:
    """Whether the scene is already staged from the same recipe and the same bytes; ``verify`` re-reads all of them."""
    staged = read_staged(task.sidecar)
    if staged is None or staged.digest != task.digest:
        return False
    if not task.tiles_file.is_file() or task.tiles_file.stat().st_size != staged.size:
        return False
    if verify and not _tiles_are_sound(task.tiles_file, staged):
        return False
    if [source.path for source in staged.sources] != input_files(task.root, task.scene):
        return False
    return all(_is_unchanged(task.root, source, verify) for source in staged.sources)


def _is_unchanged(root: Path, source: Source, verify: bool) -> bool:
    stat = (root / source.path).stat()
    if stat.st_size != source.bytes:
        return False
    return (stat.st_mtime_ns == source.mtime_ns and not verify) or source_of(root, source.path).sha256 == source.sha256


def _tiles_are_sound(path: Path, staged: StagedScene) -> bool:
    with path.open("rb") as file:
        blobs = (blob for tile in staged.tiles for blob in (*dict(tile.members).values(), tile.histogram) if blob)
        return all(zlib_ng.crc32(read_blob(file, blob)) == blob.crc32 for blob in blobs)


def read_blob(file: IO[bytes], blob: Blob) -> bytes:
    """The bytes of a blob of an open .tiles file."""
    file.seek(blob.offset)
    return file.read(blob.size)


def stage_scene(task: StageTask) -> Work:
    """Stage one scene.

    Raises:
        InputError: when a file cannot be read to its end or too much of the label is unknown to the recipe.
    """
    task.sidecar.unlink(missing_ok=True)
    sources = [source_of(task.root, path) for path in input_files(task.root, task.scene)]
    with (
        rasterio.Env(GDAL_CACHEMAX=CACHE_MB),
        open_scene(task.recipe, task.root, task.scene) as reader,
    ):
        with atomic_file(task.tiles_file) as target:
            tiles = list(_staged_tiles(task, reader, target))
            reader.check_unmatched(task.root)
        record = StagedScene(
            scene=task.scene.id,
            labelled=reader.labelled,
            extra=task.scene.extra,
            digest=task.digest,
            sources=sources,
            size=task.tiles_file.stat().st_size,
            height=reader.grid.height,
            width=reader.grid.width,
            crs=reader.crs_wkt,
            transform=list(reader.grid.transform)[:6],
            label=reader.counts(),
            empty=reader.empty,
            tiles=tiles,
        )
    write_atomic(task.sidecar, record.model_dump_json().encode())
    return Work(len(tiles), record.size)


def _staged_tiles(task: StageTask, reader: SceneReader, target: IO[bytes]) -> Iterator[StagedTile]:
    def put(data: bytes) -> Blob:
        offset = target.tell()
        target.write(data)
        return Blob(offset=offset, size=len(data), crc32=zlib_ng.crc32(data))

    classes, codec = len(task.recipe.classes), task.recipe.codec
    for tile in reader.tiles():
        counted = tile.image.dtype == np.uint8 and codec.image not in LOSSY
        counts = np.zeros(256, dtype=np.int64) if tile.codes is None else histogram(tile.codes.ravel())
        pixels = counts[:classes].tolist()
        share = _share(tile.valid)
        transform = _moved(reader.grid.transform, tile.window)
        image = put(
            encode_image(tile.image, tile.valid, reader.crs_wkt, transform, codec=codec.image, quality=codec.quality)
        )
        mask = put(encode_mask(tile.valid)) if share < 1 and not holds_mask(codec.image) else None
        label = None
        if tile.codes is not None:
            ids = tile.codes
            if counts[FIRST_REASON:].any():
                ids = np.where(ids >= FIRST_REASON, np.uint8(IGNORE), ids)
            label = put(encode_label(ids, reader.crs_wkt, transform, codec=codec.label))
        present = [k for k, count in enumerate(pixels) if count]
        yield StagedTile(
            key=tile_key(task.scene.id, tile.window),
            row=tile.window.row,
            col=tile.window.col,
            valid_share=share,
            classes=sum(1 << k for k in present),
            pixels=pixels,
            ignored={reason: int(counts[code]) for reason, code in REASONS.items()},
            histogram=put(_histograms(tile, share)) if counted else None,
            image=image,
            mask=mask,
            label=label,
            meta=put(_meta(task, reader.crs_wkt, tile.window, transform, share, present)),
        )


def _moved(transform: Affine, window: Window) -> Affine:
    x, y = place_of(transform, window.col, window.row)
    return Affine(transform.a, transform.b, x, transform.d, transform.e, y)


def tile_key(scene: str, window: Window) -> str:
    """The name of a tile: unique in its dataset, without dots and slashes, sorting by scene, row and column."""
    return f"{scene}_r{window.row:05d}_c{window.col:05d}"


def _share(valid: npt.NDArray[np.bool_]) -> float:
    """Share of valid pixels, rounded to the float32 of the index but below 1 unless all are valid."""
    count = np.count_nonzero(valid)
    share = np.float32(count / valid.size)
    return float(share if count == valid.size else min(share, np.nextafter(np.float32(1), np.float32(0))))


def _histograms(tile: Tile, share: float) -> bytes:
    """Counted while the pixels are at hand, since which tiles train is known only when all are."""
    bands = tile.image.reshape(len(tile.image), -1) if share == 1 else tile.image[:, tile.valid]
    return np.stack([histogram(band) for band in bands]).astype(np.int32).tobytes()


def _meta(
    task: StageTask, crs: str | None, window: Window, transform: Affine, share: float, present: list[int]
) -> bytes:
    record = {
        "crs": crs,
        "transform": list(transform)[:6],
        "window": {"row": window.row, "col": window.col, "height": window.size, "width": window.size},
        "scene": task.scene.id,
        "bands": task.recipe.bands.names,
        "valid_share": share,
        "classes": present,
    }
    return json.dumps(record, sort_keys=True).encode()
