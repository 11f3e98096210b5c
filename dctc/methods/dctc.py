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

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dctc.methods.base import Batch, Method, Round, Update, cut, inference, joined
from dctc.methods.dctc_options import Options
from dctc.methods.losses import cross_entropy_sum, mean_prediction, pixel_count, pseudo_label, ramp_up
from dctc.networks import NetworkSpec, build_decoder, build_encoder, build_network

STUDENTS = ("s1", "s2")


class Lesson(NamedTuple):
    """What a student learns in an update: a loss term of that name, on these micro-batches."""

    term: str
    student: str
    batches: Sequence[Batch]
    labels: Sequence[Tensor]
    temperature: float


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
        self.cycle = 3 if options.round == "epoch" else 1

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """Phases 1 to 3 of the module's table, or the one whose epoch it is."""
        options = self.options
        phases = (1, 2, 3) if options.round == "iteration" else (1 + step // self.length.epoch % 3,)
        if 1 in phases:
            yield self._teacher_update(labelled)
        if 2 in phases and (rate := ramp_up(step, options.phase2_start, options.phase2_ramp)):
            taught = [self._label_by_teacher(batch) for batch in unlabelled]
            lessons = self._lessons(unlabelled, {"teacher_to_s1": taught, "teacher_to_s2": taught})
            if options.labels_for_students:
                known = [batch.required_labels() for batch in labelled]
                lessons += [Lesson(f"labels_to_{student}", student, labelled, known, 1.0) for student in STUDENTS]
            yield from self._student_updates(lessons, rate)
        if 3 in phases and (rate := ramp_up(step, options.phase3_start, options.phase3_ramp)):
            crossed = [self._label_by_students(batch) for batch in unlabelled]
            by_s1, by_s2 = [y1 for y1, _ in crossed], [y2 for _, y2 in crossed]
            yield from self._student_updates(self._lessons(unlabelled, {"s2_to_s1": by_s2, "s1_to_s2": by_s1}), rate)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of ``s1``, ``s2``, ``teacher`` and ``mean`` (log of the mean of both students' probabilities)."""
        features = self.parts["encoder"](images)
        s1, s2 = (self.parts[student](features, images.shape[-2:]) for student in STUDENTS)
        return {"s1": s1, "s2": s2, "mean": mean_prediction(s1, s2), "teacher": self.parts["teacher"](images)}

    def _teacher_update(self, labelled: Sequence[Batch]) -> Update:
        labels = [batch.required_labels() for batch in labelled]

        def sums(micro: int) -> Tensor:
            logits = self.parts["teacher"](labelled[micro].images)
            return cross_entropy_sum(logits, labels[micro], kind=self.options.loss)[None]

        return Update(("teacher",), ("teacher",), [pixel_count(y)[None] for y in labels], sums)

    def _lessons(self, batches: Sequence[Batch], targets: dict[str, list[Tensor]]) -> list[Lesson]:
        """From pseudo-labels; ``targets``: term -> labels, S1's term first."""
        return [
            Lesson(term, s, batches, y, self.temperature if self.options.sharpen in (s, "both") else 1.0)
            for s, (term, y) in zip(STUDENTS, targets.items(), strict=True)
        ]

    def _student_updates(self, lessons: Sequence[Lesson], rate: float) -> Iterator[Update]:
        """One update a student in turn, or one for both when fused."""
        for students in [STUDENTS] if self.options.update == "fused" else [(student,) for student in STUDENTS]:
            chosen = [lesson for lesson in lessons if lesson.student in students]
            micros = range(len(chosen[0].batches))
            counts = [torch.stack([pixel_count(lesson.labels[m]) for lesson in chosen]) for m in micros]
            terms = tuple(lesson.term for lesson in chosen)
            yield Update(terms, ("encoder", *students), counts, partial(self._student_sums, chosen), rate)

    def _student_sums(self, lessons: Sequence[Lesson], micro: int) -> Tensor:
        """One pass of the encoder over all tiles that are learnt from, and one of each student's decoder."""
        micros = {id(lesson.batches): lesson.batches[micro].images for lesson in lessons}
        images = joined(list(micros.values()))
        features = self.parts["encoder"](images)
        outputs = {s: self.parts[s](features, images.shape[-2:]) for s in dict.fromkeys(x.student for x in lessons)}
        losses = []
        for lesson in lessons:
            place = list(micros).index(id(lesson.batches))
            logits = cut(outputs[lesson.student], [len(batch) for batch in micros.values()])[place]
            losses.append(cross_entropy_sum(logits, lesson.labels[micro], lesson.temperature, self.options.loss))
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


__all__ = ["DCTC", "Options", "build"]

build = DCTC
