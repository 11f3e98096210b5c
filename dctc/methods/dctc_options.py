"""The switches of dual cross-entropy consistency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """Switches of the method; the defaults are the paper's preset, the others its ablations (table 3) and readings.

    Attributes:
        temperature: T of the sharpening, in (0, 1].
        attention: channel attention in the teacher's encoder.
        sharpen: which students' predictions are sharpened in their losses.
        loss: ``binary`` is equation 6 read literally, a sum over the classes.
        pseudo_label: ``soft`` keeps the probabilities instead of the argmax.
        round: ``epoch`` gives whole epochs to each phase in turn, instead of all phases to each iteration.
        labels_for_students: phase 2 also has CE(S(x_l), y) of each student, not sharpened.
        update: ``fused`` makes one step a phase from one encoder pass: cheaper, but not the paper's "in turn".
        phase2_start, phase3_start: round from which the phase runs.
        phase2_ramp, phase3_ramp: rounds over which its learning rate then grows as exp(-5(1-t)^2).
    """

    temperature: float = 0.5
    attention: bool = True
    sharpen: Literal["none", "s1", "s2", "both"] = "both"
    loss: Literal["multiclass", "binary"] = "multiclass"
    pseudo_label: Literal["hard", "soft"] = "hard"
    round: Literal["iteration", "epoch"] = "iteration"
    labels_for_students: bool = False
    update: Literal["in_turn", "fused"] = "in_turn"
    phase2_start: int = 0
    phase2_ramp: int = 0
    phase3_start: int = 0
    phase3_ramp: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 1:
            raise ValueError(f"temperature must lie in (0, 1], got {self.temperature}")
        for name in ("phase2_start", "phase2_ramp", "phase3_start", "phase3_ramp"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a number of rounds, at least 0, got {getattr(self, name)}")
