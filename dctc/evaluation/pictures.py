"""The same tiles each time: image, label, every net's prediction, the headline's entropy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dctc.data.loaders import DeviceBatch
from dctc.data.tiles import RawBatch
from dctc.evaluation.confusion import entropy
from dctc.evaluation.evaluate import Logits
from dctc.tracking.figures import panel, save_picture
from shards.manifest import IGNORE, Manifest

FIRST = ("teacher", "ema", "s1", "s2")  # in this order; then any other net, but the mean, which looks like the two


def draw_panels(
    logits: Logits,
    batches: Iterable[tuple[DeviceBatch, RawBatch]],
    manifest: Manifest,
    file: Path,
    headline: str,
) -> Path:
    """Write one PNG with a row for each tile of ``batches``.

    Args:
        logits: normalised images -> net name -> logits, without gradients.
        batches: of :func:`dctc.data.loaders.evaluation_batches`; padding is left out.
        headline: the net whose entropy is shown.
    """
    columns, valid = look_at(logits, batches, headline)
    return save_picture(panel(columns, manifest.classes, valid=valid, limits=_limits(manifest)), file)


def save_tiles(
    logits: Logits,
    batches: Iterable[tuple[DeviceBatch, RawBatch]],
    manifest: Manifest,
    file: Path,
    headline: str,
) -> Path:
    """Write the tiles and what each net says of them, for panels of several runs: arguments as above.

    An ``.npz`` file without pickles: ``image`` [N,C,H,W], ``label`` and each net uint8 [N,H,W], ``valid`` bool [N,H,W],
    ``limits`` [C,2] (black and white of each band), ``classes`` [K] and ``colors`` uint8 [K,3].
    """
    columns, valid = look_at(logits, batches, headline)
    maps = {f"net/{title.lower()}": values.astype(np.uint8) for title, values in columns.items() if _is_net(title)}
    arrays: dict[str, NDArray[np.generic]] = {
        "image": columns["image"],
        "label": columns["label"].astype(np.uint8),
        "valid": valid,
        "limits": np.array(_limits(manifest), np.float64),
        "classes": np.array([c.name for c in manifest.classes]),
        "colors": np.array([c.color for c in manifest.classes], np.uint8),
        **maps,
    }
    draft = file.with_name(f".{file.name}")
    with draft.open("wb") as target:
        np.savez_compressed(target, allow_pickle=False, **arrays)
    return draft.replace(file)


def _is_net(title: str) -> bool:
    return title not in ("image", "label", "entropy")


def _limits(manifest: Manifest) -> list[tuple[float, float]]:
    return [(band.percentiles["2"], band.percentiles["98"]) for band in manifest.bands]


def look_at(
    logits: Logits, batches: Iterable[tuple[DeviceBatch, RawBatch]], headline: str
) -> tuple[dict[str, NDArray[np.generic]], NDArray[np.bool_]]:
    """Title -> values of all tiles: image, label, each net's classes, the headline's entropy; and where they have
    data."""
    columns: dict[str, list[NDArray[np.generic]]] = {}
    masks = []
    for (images, valid, labels), raw in batches:
        kept = raw["rows"].numpy() >= 0
        nets = logits(images)
        shown: dict[str, NDArray[np.generic]] = {"image": raw["images"].numpy()}
        shown["label"] = np.full(valid.shape, IGNORE) if labels is None else labels.cpu().numpy()
        for name in sorted(nets.keys() - {"mean"}, key=lambda net: (*FIRST, net).index(net)):
            shown[name.upper() if name in ("s1", "s2") else name] = nets[name].argmax(1).cpu().numpy()
        shown["entropy"] = entropy(nets[headline]).cpu().numpy()
        for title, values in shown.items():
            columns.setdefault(title, []).append(values[kept])
        masks.append(valid.cpu().numpy()[kept])
    return {title: np.concatenate(values) for title, values in columns.items()}, np.concatenate(masks)
