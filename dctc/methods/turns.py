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
    wide = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    order = torch.channels_last if wide else torch.contiguous_format  # a turn alone has neither
    total: Tensor | None = None
    for turns, flip in views:
        turned = torch.rot90(images, turns, (2, 3))
        seen = function((turned.flip(3) if flip else turned).contiguous(memory_format=order))
        back = torch.rot90(seen.flip(3) if flip else seen, -turns, (2, 3))
        total = back if total is None else total + back
    if total is None:
        raise ValueError("no views to average over")
    return total / len(views)


TURNS = {1: VIEWS[:1], 2: VIEWS[:4:2], 4: VIEWS[:4]}  # evenly spaced, by their number


def mean_over_views(
    function: Callable[[Tensor], Sequence[Tensor]], images: Tensor, views: Sequence[tuple[int, bool]] = VIEWS
) -> list[Tensor]:
    """Each of ``function``'s logits, averaged as probabilities over ``views`` of the tiles and turned back.

    Args:
        function: images [B,C,H,H] -> several logits [B,K,H,H].

    Returns:
        Logits of the means: log-probabilities, float32 or wider; of a single view the function's own.
    """
    if tuple(views) == VIEWS[:1]:
        return list(function(images))

    def probabilities(shown: Tensor) -> Tensor:
        logits = torch.cat(tuple(function(shown)))
        return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)

    return list(torch.split(average_views(probabilities, images, views).log(), len(images)))
