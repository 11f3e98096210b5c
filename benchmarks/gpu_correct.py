"""Part `correct` of `benchmarks.gpu`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu_engine import Deadline, Engine, PlainLoop, Report, Setting, Unavailable, net_weights, streams
from dctc.engine.parallel import Parallel
from dctc.engine.update import Losses
from dctc.methods import Batch, Update
from dctc.networks import NetworkSpec

BANDS, CLASSES = 3, 6
LOWER = (Setting("tf32", True), Setting("bf16", True), Setting("bf16"), Setting("fp16", True))
PARITY = 1e-2  # largest relative difference of a loss of the first rounds: Adam's first steps magnify rounding
ROUNDS_OF_PARITY = 3


@dataclass
class Watched:
    """Of one round: each term's loss, and the gradient of each part after each update; whether one overflowed."""

    skipped: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def watched_round(engine: Engine, pair: tuple[Batch, Batch]) -> Watched:
    """The first round, seen update by update."""
    found = Watched()

    def watch(update: Update, losses: Losses) -> None:
        found.skipped |= losses.skipped
        found.losses |= dict(zip(losses.terms, losses.shares.tolist(), strict=True))
        for name in update.parts:
            gradients = [p.grad for p in engine.method.parts[name].parameters() if p.grad is not None]
            found.gradients[f"{'+'.join(update.terms)} / {name}"] = torch.cat([g.flatten().cpu() for g in gradients])

    engine.round(*pair, 0, watch)
    return found


def train(step: Callable[[Batch, Batch, int], Sequence[Losses | Tensor]], pairs: Sequence[tuple[Batch, Batch]],
          rounds: int) -> list[list[float]]:  # fmt: skip
    """The losses of each round; the batches come round again."""
    history = []
    for number in range(rounds):
        losses = step(*pairs[number % len(pairs)], number)
        shares = [loss.shares if isinstance(loss, Losses) else loss[None] for loss in losses]
        history.append(torch.cat(shares).tolist())
    return history


def mean_end(history: list[list[float]]) -> list[float]:
    """Mean losses of the last tenth of the rounds."""
    last = torch.tensor(history[-max(1, len(history) // 10) :])
    return [float(value) for value in last.mean(dim=0)]


@dataclass
class Comparison:
    """Of one method and network: float32 first, then everything against it."""

    method: str
    spec: NetworkSpec
    pairs: list[tuple[Batch, Batch]]
    rounds: int
    parallel: Parallel
    emit: Report

    def engine(self, setting: Setting) -> Engine:
        """A fresh one: always the same weights."""
        return Engine(self.method, self.spec, setting, self.parallel)

    def against_plain_loop(self) -> bool:
        """Float32 engine and plain loop, by the losses of the first rounds."""
        try:
            plain = PlainLoop(self.method, self.spec, self.parallel.device)
        except Unavailable as reason:
            self.emit(f"{reason}: nothing to hold float32 against")
            return True
        ours = torch.tensor(train(self.engine(Setting()).round, self.pairs, ROUNDS_OF_PARITY))
        theirs = torch.tensor(train(plain.round, self.pairs, ROUNDS_OF_PARITY))
        apart = float(((ours - theirs) / theirs).abs().max())
        holds = apart < PARITY
        verdict = "holds" if holds else "MISSED"
        self.emit(f"fp32 against the plain loop, {ROUNDS_OF_PARITY} rounds: losses differ by {apart:.1e} at most, "
                  f"limit {PARITY}: {verdict}")  # fmt: skip
        return holds

    def first_round(self, setting: Setting, exact: Watched) -> None:
        """Losses and gradients of one round."""
        found = self._without_overflow(setting)
        errors = [f"{term} {abs(found.losses[term] / loss - 1):.1e}" for term, loss in exact.losses.items()]
        self.emit(f"{setting!s:22} relative error of the losses of round 1: {', '.join(errors)}")
        for key, gradient in exact.gradients.items():
            cosine = torch.nn.functional.cosine_similarity(gradient.double(), found.gradients[key].double(), dim=0)
            self.emit(f"{'':22} 1 - cosine of the gradients, {key:32} {1 - float(cosine):.1e}")

    def _without_overflow(self, setting: Setting) -> Watched:
        """A round at the first loss scale that does not overflow; only fp16 has one, and begins too high."""
        scale: float | None = None
        while True:
            engine = self.engine(setting)
            if engine.precision.loss_scale is not None and scale is not None:
                engine.precision.loss_scale.value = scale
            found = watched_round(engine, self.pairs[0])
            if not found.skipped or engine.precision.loss_scale is None:
                return found
            scale = engine.precision.loss_scale.value

    def later_losses(self, setting: Setting, start: Tensor) -> None:
        """Losses at the end, and how far the weights have moved."""
        engine = self.engine(setting)
        ends = mean_end(train(engine.round, self.pairs, self.rounds))
        moved = float((net_weights(engine.method.parts) - start).norm() / start.norm())
        losses = " ".join(f"{value:10.5f}" for value in ends)
        self.emit(f"{setting!s:22} losses after {self.rounds} rounds: {losses}; weights moved by {moved:.4f}")


def compare(one: Comparison, deadline: Deadline, emit: Report) -> bool:
    """Everything about one method and network."""
    emit(f"\n{one.method}, {one.spec.name}")
    holds = one.against_plain_loop()
    exact_engine = one.engine(Setting())
    start = net_weights(exact_engine.method.parts)
    exact = watched_round(exact_engine, one.pairs[0])
    emit(f"{'fp32':22} losses of round 1: " + ", ".join(f"{term} {loss:.5f}" for term, loss in exact.losses.items()))
    one.later_losses(Setting(), start)
    for setting in LOWER:
        if deadline.left <= 0:
            emit(f"{setting!s:22} left out: out of time")
            continue
        try:
            one.first_round(setting, exact)
            one.later_losses(setting, start)
        except Unavailable as reason:
            emit(f"{setting!s:22} {reason}")
    return holds


def run(options: argparse.Namespace, parallel: Parallel, deadline: Deadline, emit: Report) -> bool:
    """Every method with every network."""
    quick = options.quick
    width, tile, count = options.width or (4 if quick else 64), 32 if quick else 256, 2 if quick else 4
    rounds, different = (4, 2) if quick else (100, 10)
    emit(
        f"width {width}, {tile} px, {count}+{count} made tiles, {different} batches over and over; weights of one seed"
    )
    good = True
    for network in options.networks:
        spec = NetworkSpec(BANDS, CLASSES, name=network, width=width)
        pairs = [streams(spec, count, tile, parallel.device, number) for number in range(different)]
        for method in options.methods:
            if deadline.left <= 0:
                emit(f"{method}, {network}: left out, out of time")
                continue
            good &= compare(Comparison(method, spec, pairs, rounds, parallel, emit), deadline, emit)
    return good
