"""Length of a run and its learning rate, as pure functions of the round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "poly"]
POLY_POWER = 0.9


def rounds_per_epoch(training_tiles: int, batch: int) -> int:
    """``ceil(all training tiles / batch)``: the same for every method and share, so that rows of a table cost alike."""
    return math.ceil(training_tiles / batch)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then down to 0 by the round: half a cosine, or (1 - done)^0.9 ("poly", usual in segmentation).

    Attributes:
        rounds: length of the run.
        warmup: rounds of the warm-up.
        epoch: rounds of one epoch.
        shape: of the way down.
    """

    rounds: int
    warmup: int
    epoch: int
    shape: Shape = "cosine"

    @classmethod
    def plan(
        cls,
        training_tiles: int,
        batch: int,
        epochs: int,
        warmup_epochs: float,
        rounds: int | None,
        shape: Shape = "cosine",
    ) -> Schedule:
        """From epochs, or from ``rounds``, which keeps the warm-up's share of the run."""
        epoch = rounds_per_epoch(training_tiles, batch)
        total = rounds if rounds is not None else epochs * epoch
        return cls(total, min(total, round(total * warmup_epochs / epochs)), epoch, shape)

    def factor(self, step: int) -> float:
        """What the base learning rate is multiplied with in round ``step`` (from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.rounds - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else (1 - done) ** POLY_POWER
