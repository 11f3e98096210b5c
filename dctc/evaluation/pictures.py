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
    limits = [(band.percentiles["2"], band.percentiles["98"]) for band in manifest.bands]
    joined = {title: np.concatenate(values) for title, values in columns.items()}
    return save_picture(panel(joined, manifest.classes, valid=np.concatenate(masks), limits=limits), file)
