"""Augmentation on the device, keyed by stream position: the same sample gets the same one on any layout."""

from __future__ import annotations

import torch
from torch import Tensor

from dctc.data.order import augmentation_words

SYMMETRIES = 8  # of a square: four quarter turns, each also mirrored


def square_symmetry(image: Tensor, which: int) -> Tensor:
    """One of the eight symmetries of a square applied to the last two dimensions of ``image``."""
    turned = torch.rot90(image, which % 4, (-2, -1))
    return turned.flip(-1) if which >= 4 else turned


def flips_and_turns(tensors: list[Tensor], positions: Tensor, seed: int, stream: int) -> list[Tensor]:
    """Flip and turn each sample of several [B,...,S,S] tensors alike.

    Args:
        positions: int64 [B], the samples' stream positions.
    """
    chosen = [int(word) % SYMMETRIES for word in augmentation_words(seed, stream, positions.numpy())]
    return [
        torch.stack([square_symmetry(sample, which) for sample, which in zip(tensor, chosen, strict=True)])
        for tensor in tensors
    ]
