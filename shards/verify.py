"""Find out whether a dataset is still what its manifest says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

from shards.errors import InputError
from shards.files import file_sha256
from shards.index import COLUMNS, Index, column_sha256, rebuild, tile_name, write_index
from shards.manifest import MANIFEST, Dataset, parse_manifest
from shards.remote import CacheSettings, is_url, open_store
from shards.report import PLAN

_NAMED = 5  # damaged tiles that are named for each shard


def verify(root: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Damages of a dataset, one sentence each; an empty list means that it is sound.

    Every shard, index column and plan.json is read and hashed; in a damaged shard of a folder the damaged tiles are
    named. Of a dataset behind a URL what lies on the server is fetched and hashed, whatever the cache holds.
    ``progress`` is told how many shards of how many are checked.

    Raises:
        InputError: when there is no readable manifest, or a server cannot be reached.
    """
    if is_url(root):
        return _verify_remote(str(root), progress)
    dataset = Dataset.open(root)
    damages = _check_file(dataset.root / PLAN, dataset.manifest.plan_sha256)
    damages += [f"{path}: does not belong to the dataset" for path in _strangers(dataset)]
    for name in COLUMNS:
        damages += _check_file(dataset.root / "index" / f"{name}.npy", dataset.manifest.index.get(name, ""))
    try:
        index = Index.open(dataset)
    except InputError as error:
        index = None
        damages += [] if damages else [str(error)]
    for number, shard in enumerate(dataset.manifest.shards):
        found = _check_file(dataset.root / shard.name, shard.sha256, shard.bytes)
        if found and index is not None and (dataset.root / shard.name).is_file():
            found = [f"{text}{_damaged_tiles(dataset, index, number)}" for text in found]
        damages += found
        if progress is not None:
            progress(number + 1, len(dataset.manifest.shards))
    return damages


def _verify_remote(url: str, progress: Callable[[int, int], None] | None) -> list[str]:
    store, raw = open_store(url, CacheSettings())
    manifest = parse_manifest(raw, f"{store.url}/{MANIFEST}")
    others = [(PLAN, manifest.plan_sha256), *((f"index/{name}.npy", manifest.index.get(name, "")) for name in COLUMNS)]
    files = [*others, *((shard.name, shard.sha256) for shard in manifest.shards)]
    damages = []
    for number, (name, sha256) in enumerate(files, start=1):
        found = store.sha256_of(name)
        if found != sha256:
            damages.append(f"{store.url}/{name}: {'its sha256 is not that of the manifest' if found else 'is missing'}")
        if progress is not None and number > len(others):
            progress(number - len(others), len(manifest.shards))
    return damages


def rebuild_index(root: str | Path) -> list[str]:
    """Write the index again from the shards; the names of the columns that were damaged or missing.

    Only an index that has every sha256 of the manifest is written, so what comes out is the dataset as it was packed.

    Raises:
        InputError: when the shards do not give that index.
    """
    if is_url(root):
        raise InputError(f"{root}: an index is written again where the shards lie: give that folder")
    dataset = Dataset.open(root)
    columns = rebuild(dataset)
    wrong = [name for name, column in columns.items() if column_sha256(column) != dataset.manifest.index.get(name)]
    if wrong:
        raise InputError(
            f"{dataset.root}: the shards do not give the index of the manifest (column {wrong[0]} differs), so they "
            "are damaged too; `dctc verify` names which; pack the dataset again"
        )
    lost = [
        name for name in COLUMNS if _check_file(dataset.root / "index" / f"{name}.npy", dataset.manifest.index[name])
    ]
    (dataset.root / "index").mkdir(exist_ok=True)
    write_index(dataset.root, {name: columns[name] for name in lost})
    return lost


def _check_file(path: Path, sha256: str, size: int | None = None) -> list[str]:
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return [f"{path}: {found} bytes instead of {size}"]
        return [] if file_sha256(path) == sha256 else [f"{path}: its sha256 is not that of the manifest"]
    except FileNotFoundError:
        return [f"{path}: is missing"]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]


def _strangers(dataset: Dataset) -> list[Path]:
    """Files in the folders of shards and columns that the manifest does not name: a reader of a pattern takes them."""
    known = {shard.name for shard in dataset.manifest.shards} | {f"index/{name}.npy" for name in COLUMNS}
    found = [path for folder in ("shards", "index") for path in sorted((dataset.root / folder).glob("*"))]
    return [path for path in found if path.relative_to(dataset.root).as_posix() not in known]


def _damaged_tiles(dataset: Dataset, index: Index, shard: int) -> str:
    path = dataset.root / dataset.manifest.shards[shard].name
    bad = []
    with path.open("rb") as file:
        for row in np.flatnonzero(index.shard == shard).tolist():
            for what in ("image", "mask", "label"):
                size = int(getattr(index, f"{what}_size")[row])
                file.seek(int(getattr(index, f"{what}_offset")[row]))
                if size and zlib_ng.crc32(file.read(size)) != int(getattr(index, f"{what}_crc32")[row]):
                    bad.append(f"{_name(dataset, index, row)} ({what})")
    if not bad:
        return "; no image, mask or label is touched"
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"; damaged tiles: {', '.join(bad[:_NAMED])}{more}"


def _name(dataset: Dataset, index: Index, row: int) -> str:
    try:
        return tile_name(dataset, index, row)
    except InputError:
        return f"row {row}"
