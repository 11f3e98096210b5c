"""Rounds of the extended preset and of UniMatch against loops in plain PyTorch and numpy, written here from the text of
their switches; only the networks are borrowed. Float64, as in the golden rounds beside this file."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from dctc.engine.update import OptimizerSpec
from dctc.methods import Batch, Method, OptionError, build_method
from dctc.methods.base import Length
from dctc.networks import NetworkSpec
from tests.golden.rounds import (
    ADAM,
    CLASSES,
    IGNORE,
    SGD,
    balanced,
    batches,
    built,
    by_term,
    run_round,
    updater,
    weights,
)
from tests.tiny import ROOT

EXACT = torch.float64
ROUNDS = 8
TILE = 32
STUDENTS = ("s1", "s2")

History = list[dict[str, float]]
Numbers = NDArray[np.float64]


def data(step: int) -> tuple[Batch, Batch]:
    """The batches of a round; of the unlabelled one two views, boxes for each, and keys."""
    labelled, unlabelled = batches(step, count=2, tile=TILE, dtype=EXACT)
    generator = torch.Generator().manual_seed(step)
    seen = [unlabelled.valid & (torch.rand(unlabelled.valid.shape, generator=generator) > 0.1) for _ in range(2)]
    noise = torch.randn(2, *unlabelled.images.shape, generator=generator, dtype=EXACT) * 0.3
    views = [torch.where(mask[:, None], unlabelled.images + more, 0.0) for mask, more in zip(seen, noise, strict=True)]
    boxes = torch.zeros(2, *unlabelled.valid.shape, dtype=torch.bool)
    for view in range(2):
        for sample in range(2):
            top, left = torch.randint(0, TILE // 2, (2,), generator=generator).tolist()
            boxes[view, sample, top : top + TILE // 2, left : left + TILE // 3] = True
    more: dict[str, Any] = {
        "views": views,
        "view_valid": seen,
        "boxes": boxes,
        "partner": torch.tensor([1, 0]),
        "keys": (step, 99 - step),
    }
    return labelled, replace(unlabelled, **more)


BLUNT = replace(ADAM, eps=1e-4)  # a gradient of rounding noise makes no whole step
# Running means of the classes' and of the likeliest class' probability.
MEANS = {who: [0.3, 0.2, 0.25, 0.25, 0.33] for who in ("teacher", "s1", "s2", "students")}  # else they begin too low


def engine_losses(method: Method, rounds: int = ROUNDS, spec: OptimizerSpec = BLUNT) -> History:
    method.length = Length(rounds, 4)
    method.memory["means"] = dict(MEANS)
    run = updater(method, spec)
    return [
        by_term(run_round(method, run, [labelled], [unlabelled], step))
        for step in range(rounds)
        for labelled, unlabelled in [data(step)]
    ]


# ---- the formulas


def softmax(z: Tensor) -> Numbers:
    powers = np.exp(z.detach().numpy() - z.detach().numpy().max(1, keepdims=True))
    found: Numbers = powers / powers.sum(1, keepdims=True)
    return found


def loss(z: Tensor, y: Tensor, sharp: float, weight_of: Numbers, count: float) -> Tensor:
    """Weighted cross-entropy of the prediction to the power 1/T, summed over y's pixels, by ``count``. A soft y is 0 in
    all classes where it is ignored, and weighs what its classes weigh in the mean."""
    p = torch.softmax(z, 1) ** (1 / sharp)
    p = p / p.sum(1, keepdim=True)
    if y.is_floating_point():
        weights = (y * torch.from_numpy(weight_of)[:, None, None]).sum(1, keepdim=True)
        return -(weights * y * p.log()).sum() / count
    chosen = p.gather(1, y.where(y != IGNORE, 0)[:, None])[:, 0]
    weights = torch.from_numpy(weight_of)[y.where(y != IGNORE, 0)]
    return -(weights * chosen.log() * (y != IGNORE)).sum() / count


def where(chosen: Tensor, first: Tensor, second: Tensor | int) -> Tensor:
    """By pixels, of class maps [B,H,W] or of soft labels [B,K,H,W]."""
    return torch.where(chosen[:, None] if first.is_floating_point() else chosen, first, second)


@dataclass
class Truster:
    """Least confidence by class, with its running means."""

    kind: str
    confidence: float
    drop: float
    soft: bool = False
    means: dict[str, Numbers] = field(default_factory=lambda: {who: np.array(m) for who, m in MEANS.items()})

    def labels(self, who: str, z: Tensor, valid: Tensor, step: int) -> Tensor:
        p = softmax(z)
        top, y = p.max(1), p.argmax(1)
        seen = valid.numpy()
        sure = np.ones_like(seen)
        if self.kind == "fixed":
            sure = top >= self.confidence
        elif self.kind == "adaptive":
            now = np.array([*(p[:, k][seen].mean() for k in range(CLASSES)), top[seen].mean()])
            self.means[who] = 0.99 * self.means[who] + 0.01 * now
            *of_class, tau = self.means[who]
            sure = top >= (tau * np.array(of_class) / max(of_class))[y]
        elif self.kind == "entropy":
            entropy = -(p * np.log(p)).sum(1)
            bins = np.floor(entropy / math.log(CLASSES) * 1024)
            ranked = np.sort(bins[seen])
            stay = math.ceil((1 - self.drop * (1 - step / ROUNDS)) * len(ranked) - 1e-9)
            sure = bins <= ranked[stay - 1]
        if self.soft:
            return torch.from_numpy(p * (seen & sure)[:, None])
        return torch.from_numpy(np.where(seen & sure, y, IGNORE))


class Loop:
    """Teacher and students in plain PyTorch; one Adam or SGD each."""

    def __init__(self, parts: Mapping[str, nn.Module], options: dict[str, Any], sgd: bool) -> None:
        self.nets = {name: deepcopy(part).train() for name, part in parts.items()}
        self.o = options
        self.optimizers = {
            name: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
            if sgd
            else torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-4)
            for name, net in self.nets.items()
        }
        self.truster = Truster(
            options.get("threshold", "none"), options.get("confidence", 0.95), options.get("drop", 0.2),
            options.get("pseudo_label") == "soft",
        )  # fmt: skip
        self.counts = np.zeros(CLASSES)

    def said(self, x: Tensor) -> dict[str, Tensor]:
        for net in self.nets.values():
            net.eval()
        turns = {1: [0], 2: [0, 2], 4: [0, 1, 2, 3]}[self.o.get("label_turns", 1)]
        with torch.no_grad():
            seen = [self.nets_on(torch.from_numpy(np.rot90(x.numpy(), k, (2, 3)).copy())) for k in turns]
        for net in self.nets.values():
            net.train()
        if len(seen) == 1:
            return seen[0]
        back = {
            net: [np.rot90(softmax(z[net]), -k, (2, 3)) for k, z in zip(turns, seen, strict=True)] for net in seen[0]
        }
        return {net: torch.from_numpy(np.log(np.mean(views, 0))) for net, views in back.items()}

    def nets_on(self, x: Tensor) -> dict[str, Tensor]:
        features = self.nets["encoder"](x)
        z = {s: self.nets[s](features, x.shape[-2:]) for s in STUDENTS if s in self.nets}
        return z | ({"teacher": self.nets["teacher"](x)} if "teacher" in self.nets else {})

    def looks(self, u: Batch) -> list[tuple[str, Tensor, Tensor, Tensor, float, bool]]:
        """Name, images, what is valid, pixels that show the other tile, weight, dropped."""
        count, dropped = self.o.get("views", 0), self.o.get("feature_dropout", 0) > 0
        shown = [(u.images, u.valid)] if not count else list(zip(u.views, u.view_valid, strict=True))[:count]
        found = []
        for number, (image, valid) in enumerate(shown):
            assert u.boxes is not None
            inside = u.boxes[number] if self.o.get("cutmix") else torch.zeros_like(valid)
            weight = (0.5 if dropped else 1.0) / len(shown)
            found.append((f"_view{number + 1}" if number else "", image, valid, inside, weight, False))
        if dropped:
            found.append(("_dropped", u.images, u.valid, torch.zeros_like(u.valid), 0.5, True))
        return found

    def teach(
        self,
        u: Batch,
        targets: dict[str, Tensor],
        grown: float,
        known: tuple[Batch, Tensor] | None,
        weight_of: Numbers,
        half: bool = False,
    ) -> dict[str, float]:
        """One phase; ``targets``: term -> labels of the tiles as they are, S1's first; ``half``: UniMatch's factor."""
        values: dict[str, float] = {}
        nets = [s for s in STUDENTS if s in self.nets]
        groups = [tuple(nets)] if self.o.get("update") == "fused" else [(s,) for s in nets]
        for students in groups:
            images, terms = [], []
            if targets:
                for name, image, valid, inside, weight, dropped in self.looks(u):
                    mixed = torch.where(inside[:, None], image.flip(0), image)
                    images.append((mixed, dropped))
                    for student, (term, y) in zip(nets, targets.items(), strict=True):
                        if student in students:
                            there = where(valid, y, torch.zeros_like(y) if y.is_floating_point() else IGNORE)
                            there = where(inside, there.flip(0), there)
                            count = float(torch.where(inside, valid.flip(0), valid).sum())
                            sharp = 0.5 if self.o.get("sharpen", "both") == "both" else 1.0
                            factor = (
                                weight * (grown if known else 1.0) * self.o.get("weight", 1.0) * (0.5 if half else 1.0)
                            )
                            terms.append((student, f"{term}{name}", len(images) - 1, there, sharp, factor, count))
            if known:
                images.append((known[0].images, False))
                for student in students:
                    count = float((known[1] != IGNORE).sum())
                    term = f"labels_to_{student}" if len(nets) == 2 else "supervised"
                    terms.append((student, term, len(images) - 1, known[1], 1.0, 0.5 if half else 1.0, count))
            if not terms:
                continue
            features = self.nets["encoder"](torch.cat([image for image, _ in images]))
            features = [
                torch.cat([self.drop(features, level, k, u.keys if d else ()) for k, (_, d) in enumerate(images)])
                for level in range(len(features))
            ]
            z = {s: self.nets[s](features, (TILE, TILE)) for s in students}
            total = torch.zeros((), dtype=EXACT)
            for student, term, place, y, sharp, factor, count in terms:
                one = factor * loss(z[student][2 * place : 2 * place + 2], y, sharp, weight_of, count)
                values[term] = one.item()
                total = total + one
            self.step(total, ["encoder", *students], 1.0 if known else grown)
        return values

    def drop(self, features: Sequence[Tensor], level: int, place: int, keys: Sequence[int]) -> Tensor:
        own = features[level][2 * place : 2 * place + 2]
        if not keys:
            return own
        share = self.o["feature_dropout"]
        widths = [f.shape[1] for f in features]
        first = sum(widths[:level])
        drawn = np.array([[draw.random() for _ in range(sum(widths))] for draw in map(random.Random, keys)])
        kept = (drawn[:, first : first + widths[level]] >= share) / (1 - share)
        return own * torch.from_numpy(kept)[:, :, None, None]

    def step(self, total: Tensor, names: Sequence[str], rate: float) -> None:
        for name in names:
            self.optimizers[name].zero_grad()
            self.optimizers[name].param_groups[0]["lr"] *= rate
        total.backward()  # type: ignore[no-untyped-call]  # torch's own
        for name in names:
            self.optimizers[name].step()
            self.optimizers[name].param_groups[0]["lr"] /= rate

    def grown(self, phase: int, step: int) -> float:
        start, ramp = (self.o.get(f"phase{phase}_{kind}", 0) for kind in ("start", "ramp"))
        start, ramp = (round(v * ROUNDS) if v < 1 else v for v in (start, ramp))
        if step < start:
            return 0.0
        return math.exp(-5 * (1 - (step - start) / ramp) ** 2) if step - start < ramp else 1.0

    def round(self, step: int) -> dict[str, float]:
        labelled, u = data(step)
        y = labelled.required_labels()
        self.counts += np.bincount(y[y != IGNORE].numpy(), minlength=CLASSES)
        weight_of = balanced(self.counts, self.o.get("class_balance", 0.0))
        known = (labelled, y) if self.o.get("labels_for_students") else None
        count = float((y != IGNORE).sum())
        first = loss(self.nets["teacher"](labelled.images), y, 1.0, weight_of, count)
        self.step(first, ["teacher"], 1.0)
        values = {"teacher": first.item()}
        two, three = self.grown(2, step), self.grown(3, step)
        if (pull := self.o.get("teacher_pull", 0.0)) and two:
            leaders = {f"encoder.{k}": v for k, v in self.nets["encoder"].state_dict().items()}
            leaders |= {f"decoder.{k}": v for k, v in self.nets["s1"].state_dict().items()}
            for key, own in self.nets["teacher"].state_dict().items():
                own.copy_((1 - pull) * own + pull * leaders[key] if own.is_floating_point() else leaders[key])
        targets: dict[str, Tensor] = {}
        if two:
            said = self.truster.labels("teacher", self.said(u.images)["teacher"], u.valid, step)
            targets = {"teacher_to_s1": said, "teacher_to_s2": said}
        values |= self.teach(u, targets, two, known, weight_of)
        if three:
            z = self.said(u.images)
            if self.o.get("arbitration"):
                first_is_surer = torch.from_numpy(softmax(z["s1"]).max(1) >= softmax(z["s2"]).max(1))
                both = self.truster.labels(
                    "students", torch.where(first_is_surer[:, None], z["s1"], z["s2"]), u.valid, step
                )
                targets = {"s2_to_s1": both, "s1_to_s2": both}
            else:
                by = [self.truster.labels(s, z[s], u.valid, step) for s in STUDENTS]
                targets = {"s2_to_s1": by[1], "s1_to_s2": by[0]}
            values |= self.teach(u, targets, three, known if self.o.get("labels_in_phase3") else None, weight_of)
        return values


def assert_same(got: History, expected: History) -> None:
    assert len(got) == len(expected)
    for step, (ours, plain) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == plain.keys(), f"round {step}"
        for term, value in plain.items():
            assert math.isclose(ours[term], value, rel_tol=1e-5, abs_tol=1e-12), f"round {step}, {term}"


LABELS: dict[str, Any] = {"labels_for_students": True, "labels_in_phase3": True}
CASES: dict[str, dict[str, Any]] = {
    "labels in both phases": LABELS,
    "start and ramp with labels": {"phase2_start": 0.25, "phase2_ramp": 0.25, "phase3_start": 3, "phase3_ramp": 2}
    | LABELS,
    "one view": {"views": 1},
    "two views": {"views": 2},
    "cutmix": {"cutmix": True},
    "two views with cutmix": {"views": 2, "cutmix": True, "update": "fused"},
    "fixed": {"threshold": "fixed", "confidence": 0.3},
    "adaptive": {"threshold": "adaptive"},
    "entropy": {"threshold": "entropy", "drop": 0.6},
    "feature dropout": {"feature_dropout": 0.5},
    "class balance": {"class_balance": 0.5} | LABELS,
    "pull": {"teacher_pull": 0.25, "attention": False, "phase2_start": 2},
    "pull with attention": {"teacher_pull": 0.25, "student_attention": True},
    "arbitration": {"arbitration": True},
    "soft": {"pseudo_label": "soft", "sharpen": "none", "cutmix": True, "views": 1},
    "soft with weights, without the most uncertain": {
        "pseudo_label": "soft", "threshold": "entropy", "drop": 0.6, "class_balance": 0.5,
    } | LABELS,
    "half turns": {"label_turns": 2},
    "quarter turns": {"label_turns": 4, "threshold": "entropy", "drop": 0.6},
    "the preset": {
        "cutmix": True, "label_turns": 4, "pseudo_label": "soft", "sharpen": "none", "teacher_pull": 0.02,
        "attention": False, "update": "fused", "phase2_start": 0.1, "phase2_ramp": 0.2, "phase3_start": 0.2,
        "phase3_ramp": 0.2, "class_balance": 0.5,
    } | LABELS,
    "all": {
        "views": 2, "cutmix": True, "feature_dropout": 0.25, "threshold": "adaptive", "class_balance": 0.5,
        "teacher_pull": 0.1, "attention": False, "arbitration": True, "update": "fused", "label_turns": 4,
        "phase2_start": 0.25, "phase3_start": 0.5, "phase3_ramp": 0.25,
    } | LABELS,
}  # fmt: skip


@pytest.mark.parametrize(("name", "sgd"), [*((name, True) for name in CASES), ("all", False)])
def test_each_switch(name: str, sgd: bool) -> None:
    """SGD shows the scale of every gradient, which Adam hides."""
    method = built(dtype=EXACT, **CASES[name])
    loop = Loop(method.parts, CASES[name], sgd)
    expected = [loop.round(step) for step in range(ROUNDS)]
    assert_same(engine_losses(method, spec=SGD if sgd else BLUNT), expected)


def test_the_shipped_preset_is_one_of_them() -> None:
    shipped = yaml.safe_load((ROOT / "configs" / "extended.yaml").read_text())["method"]
    assert shipped == CASES["the preset"] | {"ensemble": True}


def test_each_switch_makes_a_difference() -> None:
    """Or the golden rounds would prove nothing of them."""
    rounds = 4  # all begin before the last of them
    plain, with_labels = (engine_losses(built(dtype=EXACT, **options), rounds) for options in ({}, LABELS))
    for name, options in CASES.items():
        base = with_labels if "labels_for_students" in options else plain
        if options is not LABELS:
            assert engine_losses(built(dtype=EXACT, **options), rounds) != base, name
    assert plain != with_labels


# ---- UniMatch


@pytest.mark.parametrize(
    "options",
    [{}, {"views": 1}, {"cutmix": False}, {"feature_dropout": 0.0}, {"weight": 2.0}, {"class_balance": 0.5}],
    ids=str,
)
def test_unimatch(options: dict[str, Any]) -> None:
    """A half of each, the unlabelled half divided as the paper has it."""
    options = {"confidence": 0.3} | options
    method = built("unimatch", dtype=EXACT, **options)
    settings = {
        "views": 2, "cutmix": True, "feature_dropout": 0.5, "update": "fused", "threshold": "fixed", "sharpen": "none",
    } | options  # fmt: skip
    loop = Loop(method.parts, settings, sgd=False)
    expected = []
    for step in range(ROUNDS):
        labelled, u = data(step)
        y = labelled.required_labels()
        loop.counts += np.bincount(y[y != IGNORE].numpy(), minlength=CLASSES)
        weight_of = balanced(loop.counts, options.get("class_balance", 0.0))
        said = loop.truster.labels("s1", loop.said(u.images)["s1"], u.valid, step)
        expected.append(loop.teach(u, {"consistency": said}, 1.0, (labelled, y), weight_of, half=True))
    assert_same(engine_losses(method), expected)


def test_unimatch_asks_for_what_the_paper_has() -> None:
    needs = built("unimatch").unlabelled_needs
    assert (needs.views, needs.kind, needs.keys) == (2, "strong", True)
    assert needs.boxes is not None
    assert (needs.boxes.count, needs.boxes.smallest, needs.boxes.largest, needs.boxes.chance) == (1, 0.02, 0.4, 0.5)


# ---- the rest


def test_supervised_with_class_weights() -> None:
    method = built("supervised", dtype=EXACT, class_balance=0.5)
    parts = built(dtype=EXACT).parts | {"teacher": method.parts["network"]}
    loop = Loop(parts, {"class_balance": 0.5, "phase2_start": 99, "phase3_start": 99}, sgd=False)
    expected = [{"supervised": loop.round(step)["teacher"]} for step in range(ROUNDS)]
    assert_same(engine_losses(method), expected)


def test_the_teacher_begins_as_the_student_where_it_is_pulled() -> None:
    parts = built(teacher_pull=0.1, attention=False).parts
    state = parts["teacher"].state_dict()
    for half, part in (("encoder", "encoder"), ("decoder", "s1")):
        assert all(torch.equal(state[f"{half}.{key}"], value) for key, value in parts[part].state_dict().items())
    assert not torch.equal(weights(built(attention=False)), weights(built(teacher_pull=0.1, attention=False)))


def test_the_ensemble_is_the_mean_of_the_three() -> None:
    method = built(ensemble=True)
    for module in method.parts.values():
        module.eval()
    images = data(0)[0].images.float()
    z = {name: torch.softmax(value, 1) for name, value in method.logits(images).items()}
    assert list(z) == ["s1", "s2", "mean", "teacher", "ensemble"]
    torch.testing.assert_close(z["ensemble"], (z["s1"] + z["s2"] + z["teacher"]) / 3)
    assert "ensemble" not in built().logits(images)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dctc", {"views": 3}, "views is the number of strong views"),
        ("dctc", {"label_turns": 3}, "label_turns is the number of turns .*, 1, 2 or 4, got 3"),
        (
            "dctc",
            {"teacher_pull": 0.1},
            "teacher_pull moves the teacher .* set attention and student_attention alike, now True and False",
        ),
        ("dctc", {"teacher_pull": 0.1, "attention": False, "student_attention": True}, "alike, now False and True"),
        ("dctc", {"teacher_pull": 1.0, "attention": False}, r"teacher_pull must lie in \[0, 1\)"),
        ("dctc", {"labels_in_phase3": True}, "labels_in_phase3 goes with labels_for_students=true"),
        ("dctc", {"feature_dropout": 1.0}, r"feature_dropout must lie in \[0, 1\)"),
        ("dctc", {"confidence": 95.0}, r"confidence must lie in \[0, 1\]"),
        ("dctc", {"threshold": "some"}, "threshold is 'some': expected one of none, fixed, adaptive, entropy"),
        ("dctc", {"phase2_start": 1.5}, "phase2_start is a whole number of rounds, or a share of the run below 1"),
        ("dctc", {"class_balance": -1.0}, r"class_balance must lie in \[0, 1\]"),
        ("dst_cbc", {"label_turns": 3}, "label_turns is the number of turns .*, 1, 2 or 4, got 3"),
        ("supervised", {"class_balance": 2.0}, r"class_balance must lie in \[0, 1\]"),
        ("unimatch", {"views": 0}, "views is the number of strong views, 1 or 2"),
        ("unimatch", {"confidence": 1.1}, r"confidence must lie in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        build_method(name, NetworkSpec(3, CLASSES, width=4), options)
    assert caught.value.key in options
