"""Predictions averaged over turns and mirror images of a tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

VIEWS = tuple((turns, flip) for flip in (False, True) for turns in range(4))  # of a square; the first is the identity


def average_views(
    function: Callable[[Tensor], Tensor], images: Tensor, views: Sequence[tuple[int, bool]] = VIEWS
) -> Tensor:
    """Mean over ``views`` (quarter turns, then a mirror) of ``function`` turned back; [B,C,H,H] -> [B,K,H,H].

    Over all eight views the result turns and mirrors exactly as the images do, whatever ``function`` is.
    """
    total: Tensor | None = None
    for turns, flip in views:
        turned = torch.rot90(images, turns, (2, 3))
        seen = function(turned.flip(3) if flip else turned)
        back = torch.rot90(seen.flip(3) if flip else seen, -turns, (2, 3))
        total = back if total is None else total + back
    if total is None:
        raise ValueError("no views to average over")
    return total / len(views)


def turned_mean(function: Callable[[Tensor], Sequence[Tensor]], images: Tensor, turns: int) -> list[Tensor]:
    """Each of ``function``'s logits, averaged as probabilities over evenly spaced turns of the tiles and turned back.

    Args:
        function: images [B,C,H,H] -> several logits [B,K,H,H].
        turns: 1 leaves the logits as they are, 2 is the half turn beside them, 4 the quarter turns.

    Returns:
        Logits of the means, log-probabilities in float32 or wider where ``turns`` is not 1.
    """
    if turns == 1:
        return list(function(images))

    def probabilities(shown: Tensor) -> Tensor:
        logits = torch.cat(tuple(function(shown)))
        return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)

    views = [(turn, False) for turn in range(0, 4, 4 // turns)]
    mean = average_views(probabilities, images, views)
    return list(torch.split(mean.log(), len(images)))
