"""Dual cross-entropy consistency: a teacher with channel attention, two students that share an encoder.

One round (paper, section 2.1, figure 1; numbers are the paper's equations):
    1   teacher      L_t    = CE(Tc(x_l), y)                              steps {Tc}       (7-9)
    2a  teacher->S1  L_t>s1 = CE(sharpen(S1(x_u)), argmax Tc(x_u))        steps {E, D1}    (10-13)
    2b  teacher->S2  L_t>s2 = CE(sharpen(S2(x_u)), argmax Tc(x_u))        steps {E, D2}    (14)
    3a  S2->S1       L_s2>s1 = CE(sharpen(S1(x_u)), argmax S2(x_u))       steps {E, D1}    (15)
    3b  S1->S2       L_s1>s2 = CE(sharpen(S2(x_u)), argmax S1(x_u))       steps {E, D2}    (16)
"b" runs forward again, through the encoder that "a" has just moved. Both students label x_u once, before 3a.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dctc.methods.base import Batch, Method, Update, inference
from dctc.methods.losses import cross_entropy_sum, pixel_count, pseudo_label, ramp_up
from dctc.networks import NetworkSpec, build_decoder, build_encoder, build_network

STUDENTS = ("s1", "s2")


@dataclass(frozen=True)
class Options:
    """Switches of the method; the defaults are the paper's preset, the others its ablations (table 3) and readings.

    Attributes:
        temperature: T of the sharpening, in (0, 1].
        attention: channel attention in the teacher's encoder.
        sharpen: which students' predictions are sharpened in their losses.
        loss: ``binary`` is equation 6 read literally, a sum over the classes.
        pseudo_label: ``soft`` keeps the probabilities instead of the argmax.
        update: ``fused`` makes one step a phase from one encoder pass: cheaper, but not the paper's "in turn".
        phase2_start, phase3_start: round from which the phase runs.
        phase2_ramp, phase3_ramp: rounds over which its learning rate then grows as exp(-5(1-t)^2).
    """

    temperature: float = 0.5
    attention: bool = True
    sharpen: Literal["none", "s1", "s2", "both"] = "both"
    loss: Literal["multiclass", "binary"] = "multiclass"
    pseudo_label: Literal["hard", "soft"] = "hard"
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


class DCTC(Method):
    """Parts: ``teacher``, the shared ``encoder``, the decoders ``s1`` and ``s2`` (independent initial weights)."""

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        super().__init__(
            {
                "teacher": build_network(spec, attention=options.attention),
                "encoder": build_encoder(spec),
                "s1": build_decoder(spec),
                "s2": build_decoder(spec),
            }
        )
        self.options = options
        self.temperature = options.temperature

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Iterator[Update]:
        """Phases 1 to 3 of the module's table."""
        options = self.options
        yield self._teacher_update(labelled)
        if rate := ramp_up(step, options.phase2_start, options.phase2_ramp):
            taught = [self._label_by_teacher(batch) for batch in unlabelled]
            yield from self._student_updates(unlabelled, {"teacher_to_s1": taught, "teacher_to_s2": taught}, rate)
        if rate := ramp_up(step, options.phase3_start, options.phase3_ramp):
            crossed = [self._label_by_students(batch) for batch in unlabelled]
            by_s1, by_s2 = [y1 for y1, _ in crossed], [y2 for _, y2 in crossed]
            yield from self._student_updates(unlabelled, {"s2_to_s1": by_s2, "s1_to_s2": by_s1}, rate)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of ``s1``, ``s2``, ``teacher`` and ``mean`` (log of the mean of both students' probabilities)."""
        features = self.parts["encoder"](images)
        s1, s2 = (self.parts[student](features, images.shape[-2:]) for student in STUDENTS)
        mean = torch.logaddexp(torch.log_softmax(s1.float(), 1), torch.log_softmax(s2.float(), 1)) - math.log(2)
        return {"s1": s1, "s2": s2, "mean": mean, "teacher": self.parts["teacher"](images)}

    def _teacher_update(self, labelled: Sequence[Batch]) -> Update:
        labels = [batch.required_labels() for batch in labelled]

        def sums(micro: int) -> Tensor:
            logits = self.parts["teacher"](labelled[micro].images)
            return cross_entropy_sum(logits, labels[micro], kind=self.options.loss)[None]

        return Update(("teacher",), ("teacher",), [pixel_count(y)[None] for y in labels], sums)

    def _student_updates(
        self, unlabelled: Sequence[Batch], targets: dict[str, list[Tensor]], rate: float
    ) -> Iterator[Update]:
        """One update a student in turn, or one for both when fused. ``targets``: term -> labels, S1's term first."""
        terms = tuple(targets)
        groups = (
            [(terms, STUDENTS)]
            if self.options.update == "fused"
            else [((t,), (s,)) for t, s in zip(terms, STUDENTS, strict=True)]
        )
        for names, students in groups:
            counts = [torch.stack([pixel_count(targets[t][m]) for t in names]) for m in range(len(unlabelled))]
            sums = partial(self._student_sums, unlabelled, [targets[t] for t in names], students)
            yield Update(names, ("encoder", *students), counts, sums, rate)

    def _student_sums(
        self, unlabelled: Sequence[Batch], targets: list[list[Tensor]], students: Sequence[str], micro: int
    ) -> Tensor:
        images = unlabelled[micro].images
        features = self.parts["encoder"](images)
        losses = []
        for student, labels in zip(students, targets, strict=True):
            logits = self.parts[student](features, images.shape[-2:])
            temperature = self.options.temperature if self.options.sharpen in (student, "both") else 1.0
            losses.append(cross_entropy_sum(logits, labels[micro], temperature, self.options.loss))
        return torch.stack(losses)

    def _label_by_teacher(self, batch: Batch) -> Tensor:
        with inference(self.parts["teacher"]):
            return pseudo_label(self.parts["teacher"](batch.images), batch.valid, self.options.pseudo_label == "soft")

    def _label_by_students(self, batch: Batch) -> tuple[Tensor, Tensor]:
        modules = [self.parts[name] for name in ("encoder", *STUDENTS)]
        soft = self.options.pseudo_label == "soft"
        with inference(*modules):
            features = modules[0](batch.images)
            y1, y2 = (
                pseudo_label(decoder(features, batch.images.shape[-2:]), batch.valid, soft) for decoder in modules[1:]
            )
        return y1, y2


build = DCTC
