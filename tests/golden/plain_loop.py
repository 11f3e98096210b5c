"""The round in plain PyTorch, written from the table of the method ("The round"); it borrows only the networks.

The sharpening is taken by explicit powers of the softmax in float64, and each of Tc, E, D1, D2 has one torch optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dctc.methods import Batch
from tests.golden.rounds import CLASSES, IGNORE, TERMS

Outputs = Tensor | tuple[Tensor, ...]  # of a net with deep supervision in training mode several


@dataclass(frozen=True)
class Switches:
    """The readings of the method that the loop knows; ``start`` and ``ramp`` are of phases 2 and 3."""

    temperature: float = 0.5
    sharpen: str = "both"
    loss: str = "multiclass"
    soft: bool = False
    fused: bool = False
    start: tuple[int, int] = (0, 0)
    ramp: tuple[int, int] = (0, 0)
    sgd: bool = False
    clip: float | None = None
    epoch: int | None = None  # rounds of one, each of a single phase
    labels: bool = False  # students see labels in phase 2


class PlainLoop:
    """One step on each of the five losses in turn."""

    def __init__(self, parts: Mapping[str, nn.Module], switches: Switches) -> None:
        self.nets = {name: deepcopy(module).train() for name, module in parts.items()}
        self.switches = switches
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
            if switches.sgd
            else torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
            for name, net in self.nets.items()
        }

    def round(self, labelled: Batch, unlabelled: Batch, step: int) -> dict[str, float]:
        """The losses of round ``step`` by term."""
        only = None if self.switches.epoch is None else step // self.switches.epoch % 3
        y = labelled.required_labels()
        truth = nn.functional.one_hot(y.where(y != IGNORE, 0), CLASSES).movedim(-1, 1).double() * (y != IGNORE)[:, None]
        values = {}
        if only in (None, 0):
            loss = self.loss(self.nets["teacher"](labelled.images), truth, 1.0)  # equation 9 has no sharpening
            self.step(loss, ["teacher"])
            values["teacher"] = loss.item()
        x, valid = unlabelled.images, unlabelled.valid
        for phase, names in enumerate((TERMS[1:3], TERMS[3:5])):
            if not (weight := self.weight(phase, step)) or only not in (None, phase + 1):
                continue
            for net in self.nets.values():
                net.eval()
            with torch.no_grad():
                said = [self.nets["teacher"](x)] * 2 if phase == 0 else [self.student(2, x), self.student(1, x)]
                targets = [self.pseudo(z, valid) for z in said]
            for net in self.nets.values():
                net.train()
            known = (labelled.images, truth) if self.switches.labels and phase == 0 else None
            names = (*names, *(("labels_to_s1", "labels_to_s2") if known else ()))
            values |= dict(zip(names, self.teach(x, targets, weight, known), strict=True))
        return values

    def student(self, number: int, x: Tensor) -> Any:
        """S = D after E."""
        return self.nets[f"s{number}"](self.nets["encoder"](x), x.shape[-2:])

    def loss(self, logits: Outputs, target: Tensor, temperature: float) -> Tensor:
        """Equation 6 of equation 5, mean over the pixels that count; ``target`` [B,K,H,W] is all zero where ignored.
        With deep supervision the sum of seven."""
        if not isinstance(logits, Tensor):
            assert len(logits) == 7
            return torch.stack([self.loss(z, target, temperature) for z in logits]).sum()
        p = torch.softmax(logits.double(), 1) ** (1 / temperature)
        p = p / p.sum(1, keepdim=True)
        pixels = -(target * p.log()).sum(1)
        if self.switches.loss == "binary":
            others = torch.stack([p[:, [k for k in range(CLASSES) if k != c]].sum(1) for c in range(CLASSES)], 1)
            pixels = pixels - ((1 - target) * others.log()).sum(1)
        return pixels[target.sum(1) > 0].mean()

    def pseudo(self, logits: Tensor, valid: Tensor) -> Tensor:
        """The pseudo label as a distribution, zero where the image has no data."""
        p = torch.softmax(logits.double(), 1)
        certain = nn.functional.one_hot(logits.argmax(1), CLASSES).movedim(-1, 1).double()
        return (p if self.switches.soft else certain) * valid[:, None]

    def weight(self, phase: int, step: int) -> float:
        """0 before the start, exp(-5(1-t)^2) along the ramp, then 1."""
        start, ramp = self.switches.start[phase], self.switches.ramp[phase]
        if step < start:
            return 0.0
        return math.exp(-5 * (1 - (step - start) / ramp) ** 2) if step - start < ramp else 1.0

    def teach(
        self, x: Tensor, targets: Sequence[Tensor], weight: float, known: tuple[Tensor, Tensor] | None
    ) -> list[float]:
        """One phase: S1 on the first target, S2 on the second, both on ``known`` images and truth where there are
        some, which go through the nets beside x."""
        sharp = [self.switches.temperature if self.switches.sharpen in (s, "both") else 1.0 for s in ("s1", "s2")]
        images = x if known is None else torch.cat([x, known[0]])

        def of(logits: Outputs, tiles: slice) -> Outputs:
            return logits[tiles] if isinstance(logits, Tensor) else tuple(z[tiles] for z in logits)

        def losses(number: int, logits: Outputs) -> list[Tensor]:
            found = [self.loss(of(logits, slice(len(x))), targets[number - 1], sharp[number - 1])]
            return found if known is None else [*found, self.loss(of(logits, slice(len(x), None)), known[1], 1.0)]

        pairs = []
        if self.switches.fused:
            features = self.nets["encoder"](images)
            pairs = [losses(n, self.nets[f"s{n}"](features, x.shape[-2:])) for n in (1, 2)]
            self.step(torch.stack([loss for pair in pairs for loss in pair]).sum(), ["encoder", "s1", "s2"], weight)
        else:
            for number in (1, 2):
                pairs.append(losses(number, self.student(number, images)))
                self.step(torch.stack(pairs[-1]).sum(), ["encoder", f"s{number}"], weight)
        return [loss.item() for kind in zip(*pairs, strict=True) for loss in kind]

    def step(self, loss: Tensor, names: Sequence[str], rate: float = 1.0) -> None:
        """One step of the named nets at ``rate`` times the learning rate; each net's gradient clipped alone."""
        parameters = {name: list(self.nets[name].parameters()) for name in names}
        gradients = iter(torch.autograd.grad(loss, [p for name in names for p in parameters[name]]))
        for name in names:
            own = [next(gradients) for _ in parameters[name]]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in own))
            shrink = 1.0 if self.switches.clip is None else min(1.0, self.switches.clip / norm)
            for parameter, gradient in zip(parameters[name], own, strict=True):
                parameter.grad = gradient * shrink
            group = self.optimizers[name].param_groups[0]
            before = group["lr"]
            group["lr"] = before * rate
            self.optimizers[name].step()
            group["lr"] = before
