"""Predictions averaged over turns and mirror images of a tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

View = tuple[int, bool]  # quarter turns, then whether mirrored
VIEWS: tuple[View, ...] = tuple(
    (turns, flip) for flip in (False, True) for turns in range(4)
)  # the first changes nothing
TURNS = {1: VIEWS[:1], 2: VIEWS[:4:2], 4: VIEWS[:4]}  # evenly spaced, by their number


def must_be_turns(label_turns: int) -> None:
    """Raises :class:`ValueError` for a number of turns that is not one of :data:`TURNS`."""
    if label_turns not in TURNS:
        raise ValueError(f"label_turns is the number of turns that are averaged over, 1, 2 or 4, got {label_turns}")


def average_views(function: Callable[[Tensor], Tensor], images: Tensor, views: Sequence[View] = VIEWS) -> Tensor:
    """Mean over ``views`` of ``function`` turned back; [B,C,H,H] -> [B,K,H,H].

    Over all eight views the result turns and mirrors exactly as the images do, whatever ``function`` is.
    """
    return _means(lambda shown: {"": function(shown)}, images, views)[""]


def mean_over_views(
    function: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, views: Sequence[View] = VIEWS
) -> dict[str, Tensor]:
    """The logits of each net, averaged as probabilities over ``views`` of the tiles and turned back.

    Args:
        function: images [B,C,H,H] -> logits [B,K,H,H] by the name of the net.

    Returns:
        Logits of the means: log-probabilities, float32 or wider; of a single view the function's own.
    """
    if tuple(views) == VIEWS[:1]:
        return dict(function(images))

    def probabilities(shown: Tensor) -> dict[str, Tensor]:
        wide = {name: z.to(torch.promote_types(z.dtype, torch.float32)) for name, z in function(shown).items()}
        return {name: torch.softmax(z, dim=1) for name, z in wide.items()}

    return {name: mean.log() for name, mean in _means(probabilities, images, views).items()}


def _means(
    function: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, views: Sequence[View]
) -> dict[str, Tensor]:
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format  # a turn alone has neither
    sums: dict[str, Tensor] = {}
    for turns, flip in views:
        turned = torch.rot90(images, turns, (2, 3))
        found = function((turned.flip(3) if flip else turned).contiguous(memory_format=order))
        for name, seen in found.items():
            back = torch.rot90(seen.flip(3) if flip else seen, -turns, (2, 3))
            sums[name] = sums[name] + back if name in sums else back
    return {name: total / len(views) for name, total in sums.items()}
