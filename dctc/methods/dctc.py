"""Dual cross-entropy consistency: a teacher with channel attention, two students that share an encoder.

One round (paper, section 2.1, figure 1; numbers are the paper's equations):
    1   teacher      L_t    = CE(Tc(x_l), y)                              steps {Tc}       (7-9)
    2a  teacher->S1  L_t>s1 = CE(sharpen(S1(x_u)), argmax Tc(x_u))        steps {E, D1}    (10-13)
    2b  teacher->S2  L_t>s2 = CE(sharpen(S2(x_u)), argmax Tc(x_u))        steps {E, D2}    (14)
    3a  S2->S1       L_s2>s1 = CE(sharpen(S1(x_u)), argmax S2(x_u))       steps {E, D1}    (15)
    3b  S1->S2       L_s1>s2 = CE(sharpen(S2(x_u)), argmax S1(x_u))       steps {E, D2}    (16)
"b" runs forward again, through the encoder that "a" has just moved. Both students label x_u once, before 3a.

The extended preset keeps the three phases; its switches say what is learnt from which labels (docs/fewer_labels.md).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dctc.methods.base import Batch, Boxes, Follow, Method, Needs, Round, Total, Update, inference
from dctc.methods.dctc_options import Options
from dctc.methods.lessons import Lesson, Look, lesson_sums, looks
from dctc.methods.losses import cross_entropy_sum, mean_prediction, pixel_count, ramp_up
from dctc.methods.trust import Trust, class_weights, rounds_of
from dctc.methods.turns import TURNS, mean_over_views
from dctc.networks import NetworkSpec, build_decoder, build_encoder, build_network

STUDENTS = ("s1", "s2")


class DCTC(Method):
    """Parts: ``teacher``, the shared ``encoder``, the decoders ``s1`` and ``s2`` (independent initial weights)."""

    def __init__(self, spec: NetworkSpec, options: Options) -> None:
        super().__init__(
            {
                "teacher": build_network(spec, attention=options.attention),
                "encoder": build_encoder(spec, attention=options.student_attention),
                "s1": build_decoder(spec),
                "s2": build_decoder(spec),
            }
        )
        self.options = options
        self.classes = spec.classes
        self.temperature = options.temperature
        self.cycle = 3 if options.round == "epoch" else 1
        self.turns = TURNS[options.label_turns]
        self.trust = Trust(options.threshold, options.confidence, options.drop, options.pseudo_label == "soft")
        self.unlabelled_needs = Needs(
            options.views, boxes=Boxes() if options.cutmix else None, keys=options.feature_dropout > 0
        )
        if options.teacher_pull:
            follow = {"encoder": self.parts["encoder"].state_dict(), "decoder": self.parts["s1"].state_dict()}
            self.parts["teacher"].load_state_dict(
                {f"{half}.{key}": value for half, state in follow.items() for key, value in state.items()}
            )

    def round(self, labelled: Sequence[Batch], unlabelled: Sequence[Batch], step: int) -> Round:
        """Phases 1 to 3 of the module's table, or the one whose epoch it is."""
        options = self.options
        phases = (1, 2, 3) if options.round == "iteration" else (1 + step // self.length.epoch % 3,)
        labels = [batch.required_labels() for batch in labelled]
        weights = yield from class_weights(labels, self.classes, options.class_balance, self.memory)
        known = self._known(labelled, labels) if options.labels_for_students else []
        shown = looks(unlabelled, options.views, options.cutmix, options.feature_dropout > 0)
        begun = self._grown(step)
        if 1 in phases:
            yield self._teacher_update(labelled, labels, weights)
            if options.teacher_pull and begun[0]:
                yield Follow("teacher", ("encoder", "s1"), keep=1 - options.teacher_pull)
        if 2 in phases:
            lessons = []
            if begun[0]:
                taught = yield from self._label_by_teacher(unlabelled, step)
                lessons = self._lessons(shown, {"teacher_to_s1": taught, "teacher_to_s2": taught})
            yield from self._student_updates(lessons, known, begun[0], weights)
        if 3 in phases and begun[1]:
            by_s1, by_s2 = yield from self._label_by_students(unlabelled, step)
            lessons = self._lessons(shown, {"s2_to_s1": by_s2, "s1_to_s2": by_s1})
            yield from self._student_updates(lessons, known if options.labels_in_phase3 else [], begun[1], weights)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of ``s1``, ``s2``, ``teacher`` and ``mean`` (log of the mean of both students' probabilities)."""
        nets = self._students(images)
        s1, s2 = nets.values()
        nets |= {"mean": mean_prediction(s1, s2)} | self._teacher(images)
        return nets | {"ensemble": mean_prediction(s1, s2, nets["teacher"])} if self.options.ensemble else nets

    def _teacher(self, images: Tensor) -> dict[str, Tensor]:
        return {"teacher": self.parts["teacher"](images)}

    def _students(self, images: Tensor) -> dict[str, Tensor]:
        features = self.parts["encoder"](images)
        return {student: self.parts[student](features, images.shape[-2:]) for student in STUDENTS}

    def _teacher_update(self, labelled: Sequence[Batch], labels: Sequence[Tensor], weights: Tensor | None) -> Update:
        def sums(micro: int) -> Tensor:
            logits = self.parts["teacher"](labelled[micro].images)
            return cross_entropy_sum(logits, labels[micro], kind=self.options.loss, weights=weights)[None]

        return Update(("teacher",), ("teacher",), [pixel_count(y)[None] for y in labels], sums)

    def idle_options(self) -> list[str]:
        """Thresholds that are not asked for, phases that never start; no error, because it is how to leave one out."""
        total, found = self.length.rounds, self.options.idle()
        for phase, start in zip((2, 3), self.changes(), strict=True):
            if start >= total:
                found.append(f"method.phase{phase}_start is round {start} of {total}, so that phase never starts")
        return found

    def changes(self) -> list[int]:
        """The rounds in which phases 2 and 3 start."""
        return [
            rounds_of(start, self.length.rounds) for start in (self.options.phase2_start, self.options.phase3_start)
        ]

    def _grown(self, step: int) -> list[float]:
        """How far phases 2 and 3 have come: 0 before the start, 1 after the ramp."""
        ramps = [rounds_of(ramp, self.length.rounds) for ramp in (self.options.phase2_ramp, self.options.phase3_ramp)]
        return [ramp_up(step, start, ramp) for start, ramp in zip(self.changes(), ramps, strict=True)]

    def _known(self, labelled: Sequence[Batch], labels: list[Tensor]) -> list[Lesson]:
        """The labels themselves, never sharpened."""
        images, counts = [batch.images for batch in labelled], [pixel_count(y) for y in labels]
        return [Lesson(f"labels_to_{student}", student, images, labels, counts) for student in STUDENTS]

    def _lessons(self, shown: Sequence[Look], targets: dict[str, list[Tensor]]) -> list[Lesson]:
        """From pseudo labels; ``targets``: term -> labels of the tiles as they are, S1's term first."""
        return [
            Lesson(
                f"{term}{look.name}", student, look.images, look.labels(y), look.counts,
                self.temperature if self.options.sharpen in (student, "both") else 1.0, look.weight, look.keys,
            )
            for student, (term, y) in zip(STUDENTS, targets.items(), strict=True)
            for look in shown
        ]  # fmt: skip

    def _student_updates(
        self, lessons: list[Lesson], known: list[Lesson], grown: float, weights: Tensor | None
    ) -> Iterator[Update]:
        """One update a student in turn, or one for both when fused. What has grown little counts little beside labels;
        alone it moves the students little."""
        rate = grown if not known else 1.0
        chosen = [*(x._replace(weight=x.weight * (grown if known else 1.0)) for x in lessons), *known]
        for students in [STUDENTS] if self.options.update == "fused" else [(student,) for student in STUDENTS]:
            own = [lesson for lesson in chosen if lesson.student in students]
            if not own:
                continue
            counts = [torch.stack(of_micro) for of_micro in zip(*(lesson.counts for lesson in own), strict=True)]
            sums = partial(self._sums, own, weights=weights)
            yield Update(tuple(lesson.term for lesson in own), ("encoder", *students), counts, sums, rate)

    def _sums(self, lessons: Sequence[Lesson], micro: int, *, weights: Tensor | None) -> Tensor:
        return lesson_sums(self.parts, lessons, micro, self.options.loss, weights, self.options.feature_dropout)

    def _label_by_teacher(self, batches: Sequence[Batch], step: int) -> Generator[Total, Any, list[Tensor]]:
        with inference(self.parts["teacher"]):
            logits = [mean_over_views(self._teacher, batch.images, self.turns)["teacher"] for batch in batches]
        return (yield from self._trusted("teacher", logits, batches, step))

    def _label_by_students(
        self, batches: Sequence[Batch], step: int
    ) -> Generator[Total, Any, tuple[list[Tensor], list[Tensor]]]:
        """What S1 and what S2 says of each micro-batch; the same where they arbitrate."""
        with inference(*(self.parts[name] for name in ("encoder", *STUDENTS))):
            shown = [mean_over_views(self._students, batch.images, self.turns) for batch in batches]
        said = [[nets[student] for nets in shown] for student in STUDENTS]
        if self.options.arbitration:
            both = yield from self._trusted(
                "students", [surer(*pair) for pair in zip(*said, strict=True)], batches, step
            )
            return both, both
        by_s1 = yield from self._trusted("s1", said[0], batches, step)
        by_s2 = yield from self._trusted("s2", said[1], batches, step)
        return by_s1, by_s2

    def _trusted(
        self, who: str, logits: Sequence[Tensor], batches: Sequence[Batch], step: int
    ) -> Generator[Total, Any, list[Tensor]]:
        valid = [batch.valid for batch in batches]
        return (yield from self.trust.labels(who, logits, valid, self.memory, step / self.length.rounds))


def surer(first: Tensor, second: Tensor) -> Tensor:
    """Of two predictions, logits [B,K,H,W], at each pixel the one whose likeliest class is likelier."""
    tops = [torch.softmax(logits.float(), dim=1).amax(dim=1, keepdim=True) for logits in (first, second)]
    return torch.where(tops[0] >= tops[1], first, second)


__all__ = ["DCTC", "Options", "build"]

build = DCTC
