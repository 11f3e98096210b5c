"""Augmentation on the device, keyed by stream position: the same sample gets the same one on any layout.

All random numbers are drawn on the host and go over in one small tensor a batch; no operation mixes samples, so what
else is in a batch changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.data.geometry import rescale, square_symmetry
from dctc.data.order import augmentation_words
from dctc.data.photometry import WORDS as PHOTOMETRIC_WORDS
from dctc.data.photometry import add_noise, distort
from shards.manifest import IGNORE

Kind = Literal["none", "flips", "weak", "strong", "noise"]
NOISE = (
    0.15  # deviation of the view ``noise``, in deviations of the dataset: Mean Teacher's (Tarvainen and Valpola, 2017)
)

SYMMETRIES = 8  # of a square: four quarter turns, each also mirrored
SMALLEST, LARGEST = 0.5, 2.0  # scales of the weak view
CUTMIX_VIEW = 255  # keeps the boxes apart from the views
BOXES_VIEW = 128  # and those of view i, at 128 + i
KEYS_VIEW = 127  # and the samples' keys from all of them


@dataclass(frozen=True)
class View:
    """One way to look at the samples of a stream.

    ``none`` changes nothing (the paper). ``flips``: one of the eight symmetries of a square. ``weak``: that, after a
    scale drawn log-uniformly from 0.5 to 2 and a crop, or a place for the shrunk picture, at random. ``strong``: the
    geometry of ``weak`` and then photometry (:mod:`dctc.data.photometry`). ``noise``: noise alone, no geometry.
    Views of one ``geometry`` number share their geometry, so that a strong view lies pixel by pixel on a weak one.

    Attributes:
        seed, stream: key of the randomness, with a sample's stream position.
        number: tells several views of one sample apart; their photometry differs.
        geometry: whose geometry it has; None is its own.
        photometry: the amount of photometry of ``strong``, in [0, 1].
    """

    kind: Kind
    seed: int
    stream: int
    number: int = 0
    geometry: int | None = None
    photometry: float = 1.0

    def __call__(
        self, images: Tensor, valid: Tensor, labels: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Augmented copies.

        Args:
            images: normalised, float32 [B,C,S,S], 0 where not valid.
            valid: bool [B,S,S].
            labels: int64 [B,S,S] with 255 = ignore, or None.
            positions: int64 [B], stream positions, on the host.
        """
        images, valid, labels = self.place(images, valid, labels, positions)
        images, valid = self.colour(images, valid, positions)
        if labels is not None and self.kind == "strong":
            labels = torch.where(valid, labels, IGNORE)
        return images, valid, labels

    def place(
        self, images: Tensor, valid: Tensor, labels: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The geometry alone; what comes from beyond the tile is not valid, and ignore in the labels."""
        if self.kind in ("none", "noise"):
            return images, valid, labels
        number = self.number if self.geometry is None else self.geometry
        words = augmentation_words(self.seed, self.stream, positions.numpy(), 4, number)
        if self.kind != "flips":
            scale = SMALLEST * (LARGEST / SMALLEST) ** uniform(words[:, 1])
            images, valid, labels = rescale(images, valid, labels, scale, uniform(words[:, 2:4]))
        chosen = (words[:, 0] % SYMMETRIES).tolist()
        turned, seen = (_each(tensor, chosen) for tensor in (images, valid))
        return turned, seen, None if labels is None else _each(labels, chosen)

    def colour(self, images: Tensor, valid: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The photometry alone: images, and what is still valid of them (a box may be cut out)."""
        if self.kind not in ("strong", "noise"):
            return images, valid
        words = augmentation_words(self.seed, self.stream, positions.numpy(), 4 + PHOTOMETRIC_WORDS, self.number)
        if self.kind == "noise":
            return add_noise(images, valid, words[:, 4:], NOISE), valid
        return distort(images, valid, words[:, 4:], self.photometry)


def _each(tensor: Tensor, symmetries: list[int]) -> Tensor:
    return torch.stack([square_symmetry(sample, which) for sample, which in zip(tensor, symmetries, strict=True)])


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words to numbers in [0, 1): their upper 53 bits times 2^-53."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def partners(batch: int, device: torch.device) -> Tensor:
    """The other one of each pair, int64 [B]: samples 2k and 2k + 1 of a micro-batch, stream positions p and p XOR 1.

    Raises:
        ValueError: for an odd batch; pairs must never be divided between micro-batches.
    """
    if batch % 2:
        raise ValueError(f"CutMix pairs the samples of a micro-batch, and {batch} is odd")
    return torch.arange(batch, device=device) ^ 1


def cutmix_masks(seed: int, stream: int, positions: Tensor, rows: Tensor, size: int, device: torch.device) -> Tensor:
    """Where each sample shows its partner: a square box, bool [B,size,size].

    With u0, u1, u2 of the sample's own words the side is floor(size * sqrt(u0)), so that the area is uniform in [0, 1)
    as Beta(1, 1) is, and the upper left corner is floor(u1 * (size - side + 1)), floor(u2 * (size - side + 1)).

    Args:
        positions: int64 [B], stream positions, on the host.
        rows: int64 [B], index rows, on the host: where both of a pair are one tile, nothing is mixed.
    """
    numbers = uniform(augmentation_words(seed, stream, positions.numpy(), 3, CUTMIX_VIEW))
    side = np.floor(size * np.sqrt(numbers[:, 0])).astype(np.int64)
    other = rows.numpy()[partners(len(rows), torch.device("cpu")).numpy()]
    side[rows.numpy() == other] = 0
    first = np.floor(numbers[:, 1:] * (size - side + 1)[:, None]).astype(np.int64)
    edges = torch.from_numpy(np.column_stack([first, first + side[:, None]])).to(device, non_blocking=True)
    axis = torch.arange(size, device=device)
    inside = [(axis >= edges[:, k, None]) & (axis < edges[:, k + 2, None]) for k in (0, 1)]
    return inside[0][:, :, None] & inside[1][:, None, :]


@dataclass(frozen=True)
class BoxSpec:
    """``count`` boxes in a tile, of equal area, whose areas sum to a share of it uniform in [smallest, largest]; with
    probability 1 - ``chance`` it has none."""

    count: int
    smallest: float
    largest: float
    chance: float = 1.0


def box_masks(
    spec: BoxSpec,
    key: tuple[int, int, int],
    positions: Tensor,
    rows: Tensor,
    size: int,
    device: torch.device,
) -> Tensor:
    """Where each sample shows its partner: the union of some boxes, bool [B,size,size].

    With u of the sample's own words each box has area a = (smallest + (largest - smallest) u0) / count of the tile. Its
    height is size * a^u1, its width size * a^(1 - u1), both rounded (so the shapes range from a full column to a full
    row, as in the CutMix of French et al., 2020), its upper left corner floor(u2 * (size - height + 1)),
    floor(u3 * (size - width + 1)); u1, u2, u3 are drawn for each box. Where u0 >= chance there is no box; u0 / chance
    stands for u0 elsewhere.

    Args:
        key: seed, stream, number of the view.
        positions: int64 [B], stream positions, on the host.
        rows: int64 [B], index rows, on the host: where both of a pair are one tile, nothing is mixed.
    """
    seed, stream, view = key
    words = augmentation_words(seed, stream, positions.numpy(), 1 + 3 * spec.count, BOXES_VIEW + view)
    numbers = uniform(words)
    drawn = numbers[:, :1] / spec.chance  # [B,1]
    area = (spec.smallest + (spec.largest - spec.smallest) * drawn.clip(max=1)) / spec.count
    along, corner = numbers[:, 1 : 1 + spec.count], numbers[:, 1 + spec.count :].reshape(len(numbers), spec.count, 2)
    sides = np.rint(size * np.stack([area**along, area ** (1 - along)], -1)).astype(np.int64)
    other = rows.numpy()[partners(len(rows), torch.device("cpu")).numpy()]
    sides[(rows.numpy() == other) | (drawn[:, 0] >= 1)] = 0
    first = np.floor(corner * (size - sides + 1)).astype(np.int64)
    edges = torch.from_numpy(np.stack([first, first + sides], -1)).to(device, non_blocking=True)  # [B,count,2,2]
    axis = torch.arange(size, device=device)
    inside = (axis >= edges[..., :1]) & (axis < edges[..., 1:])  # [B,count,2,size]: rows, columns
    return (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).any(dim=1)


def sample_keys(seed: int, stream: int, positions: Tensor) -> tuple[int, ...]:
    """A random number in [0, 2^63) for each stream position [B]."""
    words = augmentation_words(seed, stream, positions.numpy(), 1, KEYS_VIEW)[:, 0]
    return tuple((words >> np.uint64(1)).tolist())


def mix(tensor: Tensor, masks: Tensor, partner: Tensor) -> Tensor:
    """Each sample of [B,...,S,S] with its partner's pixels inside its box; for images, labels, probabilities alike."""
    spread = masks.reshape(len(masks), *([1] * (tensor.dim() - 3)), *masks.shape[-2:])
    return torch.where(spread, tensor[partner], tensor)
