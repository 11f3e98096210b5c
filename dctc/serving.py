"""A model behind MLflow's pyfunc interface: the caller's pixels in, class ids out, without a config.

MLflow imports this module by its name when it loads a model folder; the weights are read from safetensors, so nothing
is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.bundle import Bundle
from dctc.mapping.blend import Accumulator
from dctc.mapping.windows import Band, Grid, reflect
from shards.errors import InputError
from shards.manifest import IGNORE

OVERLAP = 0.25  # of the windows' sides: the default of `dctc predict`
BATCH = 8  # windows at once


class ServedModel:
    """What MLflow calls. Images larger than the model's tile go through it in overlapping, blended windows."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._mean = torch.tensor(bundle.mean, device=bundle.device)[:, None, None]

    def predict(self, images: Any, params: Mapping[str, Any] | None = None) -> NDArray[np.uint8]:
        """Class ids uint8 [N,H,W], 255 where there is no data; the same as the map that ``dctc predict`` writes.

        Args:
            images: [N,H,W,bands] in the model's own pixel type and band order, of any height and width.
            params: ``net`` (default: the one that was exported) and ``nodata``, the value that pixels without data have
                in all bands (none by default). Pixels that are not finite have no data either.

        Raises:
            InputError: another shape or pixel type, or a net that the model has not.
        """
        options = dict(params or {})
        array = np.asarray(images)
        bands = len(self.bundle.bands)
        if array.ndim != 4 or array.shape[3] != bands or array.dtype != self.bundle.dtype or 0 in array.shape:
            raise InputError(
                f"pixels are {array.dtype} {list(array.shape)}; the model takes {self.bundle.dtype} [images, height, "
                f"width, {bands}], whose bands are {', '.join(self.bundle.bands)}"
            )
        net = options.get("net") or self.bundle.headline
        nodata = options.get("nodata")
        return np.stack([self._class_map(image.transpose(2, 0, 1), net, nodata) for image in array])

    @torch.inference_mode()
    def _class_map(self, pixels: NDArray[Any], net: str, nodata: float | None) -> NDArray[np.uint8]:
        valid = np.isfinite(pixels).all(axis=0)
        if nodata is not None:
            valid &= (pixels != nodata).any(axis=0)
        height, width = valid.shape
        grid = Grid.over(height, width, self.bundle.tile_size, OVERLAP if self.bundle.tile_size > 1 else 0)
        blend = Accumulator(len(self.bundle.classes), grid, self.bundle.device)
        ids = np.full((height, width), IGNORE, np.uint8)
        for band in grid.bands():
            self._add_windows(blend, band, pixels[:, band.top : band.bottom], valid[band.top : band.bottom], net)
            ids[band.top : band.done] = blend.flush(band).argmax(0).to(torch.uint8).cpu().numpy()
        ids[~valid] = IGNORE
        return ids

    def _add_windows(
        self, blend: Accumulator, band: Band, pixels: NDArray[Any], valid: NDArray[np.bool_], net: str
    ) -> None:
        grid = blend.grid
        strip, seen = reflect(pixels, grid.tile), reflect(valid, grid.tile)
        for start in range(0, len(grid.lefts), BATCH):
            columns = range(start, min(start + BATCH, len(grid.lefts)))
            cuts = [slice(grid.lefts[i], grid.lefts[i] + grid.tile) for i in columns]
            images = self._on_device(np.stack([strip[..., cut] for cut in cuts])).float()
            known = self._on_device(np.stack([seen[..., cut] for cut in cuts]))
            logits = self.bundle.logits(torch.where(known[:, None], images, self._mean))
            if net not in logits:
                raise InputError(f"net {net!r} is not in this model: it has {', '.join(logits)}")
            blend.add(logits[net].float().softmax(1), band, columns)

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.bundle.device)


def _load_pyfunc(path: str) -> ServedModel:
    """What MLflow looks for in a loader module; ``path`` is the model file inside the model's folder."""
    return ServedModel(Bundle.load(path, "cuda" if torch.cuda.is_available() else "cpu"))
