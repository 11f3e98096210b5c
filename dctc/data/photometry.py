"""Brightness, contrast, gamma, bands, blur, noise and cutout for images of any number of bands.

Images are normalised (mean 0, deviation 1 over the dataset), so all amounts are in standard deviations. In this order,
with u the sample's numbers in [0, 1) and s the amount, 1 unless it is said (``data.photometry``):

- contrast and brightness: (1 + s (0.8 u - 0.4)) x + s (u - 1/2);
- gamma: sign(x) |x|^g, g = (0.7 * 2^u)^s;
- for each band a gain 1 + s (0.4 u - 0.2) and an offset 0.4 s (u - 1/2);
- in half of the samples a Gaussian blur over the valid pixels, deviation 0.1 + 1.9 s u pixels;
- in half of the samples noise of deviation 0.1 s u;
- in half of the samples a square box of at most a quarter of the area, its side times s, is cut out: it is no longer
  valid.

At s = 0 nothing is left of it: the deviation of the blur is then a tenth of a pixel.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

WORDS = 12  # for the sample; the two numbers of each band come from a hash of the last one
_RADIUS = 4  # pixels of the blur's kernel to each side
_MASK = 0xFFFFFFFF


def distort(images: Tensor, valid: Tensor, words: NDArray[np.uint64], amount: float = 1.0) -> tuple[Tensor, Tensor]:
    """Distorted images float32 [B,C,S,S], 0 where not valid, and what is valid of them [B,S,S].

    Args:
        words: random words [B,WORDS].
        amount: s of above, in [0, 1].
    """
    device = images.device
    host = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    keys = torch.from_numpy((words[:, -2:] >> np.uint64(32)).astype(np.int64)).to(device, non_blocking=True)
    u = torch.from_numpy(host.astype(np.float32)).to(device, non_blocking=True)
    s = amount
    x = images * (1 - 0.4 * s + 0.8 * s * u[:, 0, None, None, None]) + s * (u[:, 1, None, None, None] - 0.5)
    exponent = 0.7**s * 2.0 ** (s * u[:, 2, None, None, None])
    x = x.sign() * (x.abs().log() * exponent).exp()  # pow() rounds as threads and sizes divide the work
    bands = _hashed(torch.arange(2 * x.shape[1], device=device)[None], keys[:, :1]).view(len(x), 2, -1, 1, 1)
    x = x * (1 - 0.2 * s + 0.4 * s * bands[:, 0]) + 0.4 * s * (bands[:, 1] - 0.5)
    x = torch.where(valid[:, None], x, 0.0)
    seen = valid[:, None].float()
    both = _blurred(torch.cat([x, seen], dim=1), 0.1 + 1.9 * s * u[:, 4])  # of valid pixels alone
    smooth = both[:, :-1] / both[:, -1:].clamp(min=1e-6)
    x = torch.where((u[:, 3] < 0.5)[:, None, None, None], smooth, x)
    deviation = torch.where(u[:, 5] < 0.5, 0.1 * s * u[:, 6], 0.0)
    x = x + deviation[:, None, None, None] * _noise(x, keys[:, 1])
    valid = valid & ~_box(u[:, 7:11], x.shape[-1], s)
    return torch.where(valid[:, None], x, 0.0), valid


def add_noise(images: Tensor, valid: Tensor, words: NDArray[np.uint64], deviation: float) -> Tensor:
    """Images [B,C,S,S] with noise of that deviation where they are valid [B,S,S]; ``words`` as above."""
    key = torch.from_numpy((words[:, -1] >> np.uint64(32)).astype(np.int64)).to(images.device, non_blocking=True)
    return torch.where(valid[:, None], images + deviation * _noise(images, key), 0.0)


def _blurred(x: Tensor, deviation: Tensor) -> Tensor:
    """Each sample with its own Gaussian, as shifted sums: the same whatever else is in the batch."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets[None] / deviation[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    size = x.shape[-1]
    for axis, margins in ((-1, (_RADIUS, _RADIUS, 0, 0)), (-2, (0, 0, _RADIUS, _RADIUS))):
        wide = pad(x, margins, mode="replicate")
        x = sum(
            (weights[:, k, None, None, None] * wide.narrow(axis, k, size) for k in range(2 * _RADIUS + 1)),
            torch.zeros_like(x),
        )
    return x


def _noise(x: Tensor, key: Tensor) -> Tensor:
    """Noise of mean 0 and deviation 1 (the sum of two uniform numbers), a function of the pixel's place and the key."""
    places = torch.arange(x[0].numel(), device=x.device).view(1, *x.shape[1:])
    bits = _bits(places, key[:, None, None, None])
    return ((bits >> 16) + (bits & 0xFFFF)).float().mul_(2.0**-16).sub_(1).mul_(6**0.5)


def _hashed(numbers: Tensor, key: Tensor) -> Tensor:
    """Numbers in [0, 1) for counters and keys."""
    return _bits(numbers, key).float() * 2.0**-32


def _bits(counter: Tensor, key: Tensor) -> Tensor:
    """32 random bits for a counter and a 32-bit key, int64 (the mixer "lowbias32" of C. Wellons)."""
    x = (counter * 0x9E3779B1 + key) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _box(u: Tensor, size: int, amount: float) -> Tensor:
    """The box that is cut out, bool [B,S,S]; none where u0 >= 1/2."""
    side = torch.where(u[:, 0] < 0.5, (amount * size / 2 * u[:, 1].sqrt()).floor(), 0.0)
    axis = torch.arange(size, device=u.device)
    first = [(u[:, k] * (size - side + 1)).floor()[:, None] for k in (2, 3)]
    down, across = ((axis >= start) & (axis < start + side[:, None]) for start in first)
    return down[:, :, None] & across[:, None, :]
