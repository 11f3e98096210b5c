"""The switches of dual cross-entropy consistency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dctc.methods.trust import must_be_a_power
from dctc.methods.turns import must_be_turns


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
        labels_for_students: phase 2 also has CE(S(x_l), y) of each student, not sharpened; before its start too.
        update: ``fused`` makes one step a phase from one encoder pass: cheaper, but not the paper's "in turn".
        phase2_start, phase3_start: round from which the phase runs; below 1 a share of the run.
        phase2_ramp, phase3_ramp: rounds, or a share, over which it then grows as exp(-5(1-t)^2): the weight of its
            pseudo labels where labels stand beside them, else the learning rate, because Adam undoes a weight.

    The rest is not in the paper (docs/fewer_labels.md says what each brings):

    Attributes:
        labels_in_phase3: phase 3 has the labelled tiles too.
        views: strong views of an unlabelled tile that the students learn on, 1 or 2; 0 is the tile as it is. Labels are
            never of a strong view.
        cutmix: mix what the students learn on with another tile inside boxes, its labels likewise.
        feature_dropout: the students also learn on the tile as it is, with this share of the encoder's channels
            dropped, at half of the weight (UniMatch).
        threshold, confidence, drop: which pseudo labels count, see :class:`dctc.methods.trust.Trust`.
        class_balance: power of the class weights (:func:`dctc.methods.trust.class_weights`), 0 is none.
        teacher_pull: share by which the teacher's weights and batch-norm statistics move towards encoder and S1 after
            its supervised step, from the start of phase 2. They begin as one network then.
        student_attention: channel attention in the students' encoder too.
        label_turns: pseudo labels are of the mean prediction over 2 (half) or 4 (quarter) turns of the tile;
            1 takes it as it is.
        arbitration: in phase 3 both students learn, at each pixel, what the more confident of them says.
        ensemble: also report the mean of S1, S2 and teacher, as the net ``ensemble``.
    """

    temperature: float = 0.5
    attention: bool = True
    sharpen: Literal["none", "s1", "s2", "both"] = "both"
    loss: Literal["multiclass", "binary"] = "multiclass"
    pseudo_label: Literal["hard", "soft"] = "hard"
    round: Literal["iteration", "epoch"] = "iteration"
    labels_for_students: bool = False
    update: Literal["in_turn", "fused"] = "in_turn"
    phase2_start: float = 0
    phase2_ramp: float = 0
    phase3_start: float = 0
    phase3_ramp: float = 0
    labels_in_phase3: bool = False
    views: int = 0
    cutmix: bool = False
    feature_dropout: float = 0.0
    threshold: Literal["none", "fixed", "adaptive", "entropy"] = "none"
    confidence: float = 0.95
    drop: float = 0.2
    class_balance: float = 0.0
    teacher_pull: float = 0.0
    student_attention: bool = False
    label_turns: int = 1
    arbitration: bool = False
    ensemble: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 1:
            raise ValueError(f"temperature must lie in (0, 1], got {self.temperature}")
        for name in ("phase2_start", "phase2_ramp", "phase3_start", "phase3_ramp"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                raise ValueError(f"{name} is a whole number of rounds, or a share of the run below 1, got {value}")
        must_be_a_power(self.class_balance)
        for name in ("confidence", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("feature_dropout", "teacher_pull"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.views <= 2:
            raise ValueError(f"views is the number of strong views, 0, 1 or 2, got {self.views}")
        must_be_turns(self.label_turns)
        if self.labels_in_phase3 and not self.labels_for_students:
            raise ValueError("labels_in_phase3 goes with labels_for_students=true, which phase 2 has")
        if self.teacher_pull and self.attention != self.student_attention:
            raise ValueError(
                "teacher_pull moves the teacher towards a student, which must have the same layers: "
                f"set attention and student_attention alike, now {self.attention} and {self.student_attention}"
            )

    def idle(self) -> list[str]:
        """What has been chosen and does nothing beside the other options; no error, because models and runs have it."""
        return [
            f"method.{name} does nothing: it is of threshold={threshold}, and threshold is {self.threshold}"
            for name, threshold in (("confidence", "fixed"), ("drop", "entropy"))
            if getattr(self, name) != getattr(Options, name) and self.threshold != threshold
        ]
