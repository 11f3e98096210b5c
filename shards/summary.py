"""Look at a dataset: counts, classes, shares, statistics, splits; a contact sheet of tiles with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from rich.table import Table

from shards.errors import InputError
from shards.files import atomic_file
from shards.index import Index
from shards.labels import REASONS
from shards.manifest import IGNORE, SPLITS, Dataset, Manifest
from shards.splits import permutation
from shards.tiles import Tile, read_tile

_MARGIN, _LINE = 8, 16
_SHEET_STREAM = 3
_PAPER, _INK, _HATCH = (255, 255, 255), (0, 0, 0), (64, 64, 64)


def summarize(dataset: Dataset) -> dict[str, Any]:
    """What `dctc inspect --json` prints: plain numbers, texts, lists and mappings."""
    manifest = dataset.manifest
    return {
        "name": manifest.name,
        "digest": dataset.digest,
        "protocol": manifest.protocol,
        "tile_size": manifest.tile_size,
        "stride": manifest.stride,
        "dtype": manifest.dtype,
        "codec": manifest.codec,
        "tiles": sum(split.tiles for split in manifest.splits.values()),
        "scenes": len(manifest.scenes),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "bands": [band.model_dump() for band in manifest.bands],
        "classes": [
            {"name": info.name, "color": list(info.color), "share": shares}
            for info, shares in zip(manifest.classes, class_shares(manifest), strict=True)
        ],
        "splits": {name: split.model_dump() for name, split in manifest.splits.items()},
        "labelled": manifest.labelled.model_dump(),
    }


def class_shares(manifest: Manifest) -> list[dict[str, float]]:
    """For each class its share of each split's pixels that carry a class (0 where none do)."""
    totals = {name: max(1, sum(split.pixels)) for name, split in manifest.splits.items()}
    return [
        {name: split.pixels[k] / totals[name] for name, split in manifest.splits.items()}
        for k in range(len(manifest.classes))
    ]


def tables(dataset: Dataset) -> list[Table]:
    """The same for a terminal."""
    manifest = dataset.manifest
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    title = (
        f"{manifest.name}: {manifest.tile_size} px tiles of {manifest.dtype}, {_codec(manifest)}, "
        f"{len(manifest.scenes)} scenes, protocol {manifest.protocol}, {len(manifest.shards)} shards, {size:.1f} MiB"
    )
    return [_splits_table(manifest, title), _classes_table(manifest), _bands_table(manifest), _shares_table(manifest)]


def _codec(manifest: Manifest) -> str:
    codec = manifest.codec
    return f"{codec['image']} images" + (f" (lossy, quality {codec['quality']})" if codec.get("lossy") == "yes" else "")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _splits_table(manifest: Manifest, title: str) -> Table:
    reasons = [reason for reason in REASONS if any(split.ignored[reason] for split in manifest.splits.values())]
    heads = [reason.replace("_", " ") for reason in reasons]
    table = _table(title, ["split", "tiles", "labelled", "scenes", "class pixels", *heads])
    for name in SPLITS:
        split = manifest.splits[name]
        ignored = [split.ignored[reason] for reason in reasons]
        counts = [split.tiles, split.labelled, split.scenes, sum(split.pixels), *ignored]
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _classes_table(manifest: Manifest) -> Table:
    table = _table("classes, share of the labelled pixels", ["class", *SPLITS])
    for info, shares in zip(manifest.classes, class_shares(manifest), strict=True):
        swatch = f"[rgb({','.join(map(str, info.color))})]■[/] {info.name}"
        table.add_row(swatch, *(f"{shares[name]:.2%}" for name in SPLITS))
    return table


def _bands_table(manifest: Manifest) -> Table:
    percentiles = list(manifest.bands[0].percentiles)
    heads = ["band", "mean", "std", "min", *(f"{p} %" for p in percentiles), "max"]
    table = _table("bands, over the valid training pixels", heads)
    for band in manifest.bands:
        values = [band.mean, band.std, band.minimum, *(band.percentiles[p] for p in percentiles), band.maximum]
        table.add_row(band.name, *(f"{value:.5g}" for value in values))
    return table


def _shares_table(manifest: Manifest) -> Table:
    labelled = manifest.labelled
    table = _table(f"labelled shares, nested, seed {labelled.seed}", ["share", "tiles", "classes missing"])
    for share, count in sorted(labelled.shares.items(), key=lambda item: item[1]):
        table.add_row(share, str(count), ", ".join(labelled.missing[share]) or "none")
    return table


def contact_sheet(dataset: Dataset, file: Path, *, tiles: int = 12, columns: int = 3, width: int = 256) -> None:
    """Write a PNG of tiles of all splits, each beside its coloured label, with a legend of the classes.

    Ignored label pixels are dark grey, a tile without a label has a blank beside it. The tiles are drawn by a fixed
    seed, so the same dataset gives the same picture. ``width`` is the size in pixels of a tile in the picture.

    Raises:
        InputError: when a tile is damaged or the file cannot be written.
    """
    index = Index.open(dataset)
    rows = _drawn(index, tiles)
    high = width + _LINE + _MARGIN
    wide = 2 * width + 2 * _MARGIN
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * wide + _MARGIN, lines * high + _MARGIN + _legend_height(dataset)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        tile = read_tile(dataset, index, row)
        left, top = _MARGIN + place % columns * wide, _MARGIN + place // columns * high
        window = tile.meta["window"]
        split = SPLITS[int(index.split[row])]
        pen.text((left, top), f"{split}  {tile.meta['scene']}  row {window['row']} col {window['col']}", fill=_INK)
        for offset, picture in ((0, _photograph(dataset.manifest, tile)), (width, _colored(dataset.manifest, tile))):
            scaled = Image.fromarray(picture).resize((width, width), Image.Resampling.NEAREST)
            sheet.paste(scaled, (left + offset, top + _LINE))
    _draw_legend(pen, dataset, lines * high + _MARGIN)
    try:
        with atomic_file(file) as target:
            sheet.save(target, format="PNG")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from None


def _drawn(index: Index, tiles: int) -> list[int]:
    """Rows to show: as many of each split as there are, where possible, labelled ones first."""
    drawn: list[int] = []
    for place, split in enumerate(SPLITS):
        rows = index.rows(split)
        rows = rows[permutation(0, _SHEET_STREAM, len(rows))]
        rows = rows[np.argsort(index.classes[rows] == 0, kind="stable")]
        drawn += rows[: (tiles - len(drawn)) // (len(SPLITS) - place)].tolist()
    return drawn


def _photograph(manifest: Manifest, tile: Tile) -> npt.NDArray[np.uint8]:
    """RGB [S,S,3]: the first three bands (or the first one, grey), stretched from the 1st to the 99th percentile."""
    count = 3 if len(manifest.bands) >= 3 else 1
    planes = []
    for band, plane in zip(manifest.bands[:count], tile.image[:count].astype(np.float64), strict=True):
        low, high = band.percentiles["1"], band.percentiles["99"]
        planes.append(np.clip((plane - low) / max(high - low, 1e-12), 0, 1) * 255)
    picture = np.stack(planes * (3 // count), axis=-1).astype(np.uint8)
    picture[~tile.valid] = _HATCH
    return picture


def _colored(manifest: Manifest, tile: Tile) -> npt.NDArray[np.uint8]:
    table = np.full((256, 3), _PAPER, dtype=np.uint8)
    table[IGNORE] = _HATCH
    if tile.label is None:
        return table[np.zeros(tile.image.shape[1:], dtype=np.uint8) + IGNORE - 1]
    for k, info in enumerate(manifest.classes):
        table[k] = info.color
    return table[tile.label]


def _legend_height(dataset: Dataset) -> int:
    return (len(dataset.manifest.classes) + 1) * (_LINE + 2) + _MARGIN


def _draw_legend(pen: ImageDraw.ImageDraw, dataset: Dataset, top: int) -> None:
    entries = [(info.name, info.color) for info in dataset.manifest.classes] + [("ignored or no data", _HATCH)]
    for place, (name, color) in enumerate(entries):
        y = top + place * (_LINE + 2)
        pen.rectangle((_MARGIN, y, _MARGIN + _LINE, y + _LINE - 2), fill=color, outline=_INK)
        pen.text((_MARGIN + _LINE + 6, y + 1), name, fill=_INK)
