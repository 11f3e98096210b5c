"""Turn, mirror, scale and crop, for images with what is valid of them and their labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from shards.manifest import IGNORE


def square_symmetry(image: Tensor, which: int) -> Tensor:
    """One of the eight symmetries of a square applied to the last two dimensions of ``image``."""
    turned = torch.rot90(image, which % 4, (-2, -1))
    return turned.flip(-1) if which >= 4 else turned


def rescale(
    images: Tensor, valid: Tensor, labels: Tensor | None, scale: NDArray[np.float64], place: NDArray[np.float64]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale each sample and cut it, or fill it up, to its size again.

    With scale s and place t in [0, 1), pixel i of the result shows the source at (i + 1/2)/s - 1/2 + t(S - S/s): a crop
    somewhere inside for s > 1, the whole picture somewhere in an empty tile for s < 1.

    Args:
        images: float32 [B,C,S,S], 0 where not valid. Interpolated linearly between valid pixels alone.
        valid: bool [B,S,S]; labels: int64 [B,S,S] or None. Both take the nearest pixel, from beyond the tile False and
            ignore.
        scale: [B]; place: [B,2], vertical and horizontal.
    """
    size = images.shape[-1]
    shift = place * (size - size / scale)[:, None]
    lines = [_normalised(scale, shift[:, k], size, images.device) for k in (0, 1)]
    grid = torch.stack([lines[1][:, None, :].expand(-1, size, -1), lines[0][:, :, None].expand(-1, -1, size)], dim=-1)
    weights = valid[:, None].float()
    seen = grid_sample(weights, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0] > 0.5
    smooth = grid_sample(torch.cat([images, weights], dim=1), grid, padding_mode="zeros", align_corners=False)
    images = torch.where(seen[:, None], smooth[:, :-1] / smooth[:, -1:].clamp(min=1e-3), 0.0)
    if labels is not None:
        moved = grid_sample(labels[:, None].float() - IGNORE, grid, mode="nearest", align_corners=False)[:, 0]
        labels = torch.where(seen, moved.round().long() + IGNORE, IGNORE)
    return images, seen, labels


def _normalised(scale: NDArray[np.float64], shift: NDArray[np.float64], size: int, device: torch.device) -> Tensor:
    """Source coordinates of the pixels of one axis as grid_sample counts them (-1 and 1 are the edges), [B,S]."""
    source = (np.arange(size) + 0.5)[None] / scale[:, None] + shift[:, None]
    return torch.from_numpy((2 * source / size - 1).astype(np.float32)).to(device, non_blocking=True)
