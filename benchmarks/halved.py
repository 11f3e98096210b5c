"""Scenes at half of their resolution: a tile shows four times the ground at the same cost."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import rasterio
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning

DRIVERS: dict[str, dict[str, Any]] = {".jpg": {"driver": "JPEG", "quality": 95}, ".png": {"driver": "PNG"}}


def halve(source: Path, target: Path) -> None:
    """Write the images (JPEG, mean of 2 x 2 pixels) and masks (PNG, one of them) below ``source`` into ``target``.

    All of them or none: ``target`` appears when it is whole, and is then left as it is. An odd last row or column is
    squeezed into the others.

    Raises:
        FileNotFoundError: ``source`` has none.
    """
    if target.exists():
        return
    draft = target.with_name(f".{target.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    files = sorted(path for path in source.rglob("*") if path.suffix in DRIVERS)
    if not files:
        raise FileNotFoundError(f"{source}: no folder with {' or '.join(DRIVERS)} files; give that of the scenes")
    for file in files:
        out = draft / file.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        _halve_one(file, out)
    draft.rename(target)


def _halve_one(source: Path, target: Path) -> None:
    way = Resampling.average if source.suffix == ".jpg" else Resampling.nearest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(source) as whole:
            count, height, width = whole.count, whole.height // 2, whole.width // 2
            pixels = whole.read(out_shape=(count, height, width), resampling=way)
            colours = whole.colormap(1) if source.suffix == ".png" and count == 1 else None
        size = {"width": width, "height": height, "count": count, "dtype": pixels.dtype}
        with rasterio.open(target, "w", **DRIVERS[source.suffix], **size) as half:
            half.write(pixels)
            if colours is not None:
                half.write_colormap(1, colours)
