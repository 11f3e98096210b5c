"""Losses from logits, in log space and float32 whatever the autocast (method.md, equations 5 and 6).

A target is either a class map, int64 [B,H,W] with 255 = ignore, or soft: float [B,K,H,W] whose ignored pixels are all
zero. Losses are sums over the pixels that are not ignored; :func:`pixel_count` says how many those are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from dctc.methods.base import IGNORE

LOSSES = ("multiclass", "binary")
Outputs = Tensor | Sequence[Tensor]
"""A net's logits [B,K,H,W]; of a net with deep supervision in training mode several, the prediction first."""


def fused(outputs: Outputs) -> Tensor:
    """The logits that are the net's prediction."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def each(outputs: Outputs) -> Sequence[Tensor]:
    """All logits that a loss is taken of."""
    return [outputs] if isinstance(outputs, Tensor) else outputs


def sharpened_log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log S(softmax(logits), T)`` of equation 5, float32, same shape.

    ``S(p,T)_k = p_k^(1/T) / sum_j p_j^(1/T)`` equals ``softmax(logits / T)`` exactly, so no power is ever taken.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return torch.log_softmax(logits.float() / temperature, dim=1)


def cross_entropy_sum(
    outputs: Outputs,
    target: Tensor,
    temperature: float = 1.0,
    kind: str = "multiclass",
    weights: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy (equation 6) of ``sharpen(softmax(logits), temperature)`` against ``target``.

    Args:
        outputs: logits [B,K,H,W], any float dtype; of several the sum over all of them (deep supervision).
        target: class map or soft target (see the module).
        temperature: 1 leaves the prediction as it is; below 1 sharpens it. The gradient flows through.
        kind: ``multiclass`` is ``-log p_y``; ``binary`` is ``-[log p_y + sum_{c != y} log(1 - p_c)]``.
        weights: float [K], factor of a pixel by its class (by the mean of the classes of a soft target).

    Returns:
        float32 scalar: the sum over the pixels that are not ignored.
    """
    return torch.stack([_cross_entropy_sum(z, target, temperature, kind, weights) for z in each(outputs)]).sum()


def _cross_entropy_sum(logits: Tensor, target: Tensor, temperature: float, kind: str, weights: Tensor | None) -> Tensor:
    log_p = sharpened_log_probabilities(logits, temperature)
    with torch.autocast(logits.device.type, enabled=False):
        if target.is_floating_point():
            expected, valid, classes = target.float(), target.sum(dim=1) > 0, torch.empty(0)
        else:
            valid = target != IGNORE
            classes = torch.where(valid, target, 0)
            expected = None
        if kind == "multiclass":
            if expected is None:
                pixels = -log_p.gather(1, classes[:, None]).squeeze(1)
            else:
                pixels = -(expected * log_p).sum(dim=1)
        elif kind == "binary":
            log_q = log_complement(log_p)
            if expected is None:
                chosen = classes[:, None]
                pixels = -log_q.scatter(1, chosen, log_p.gather(1, chosen)).sum(dim=1)
            else:
                pixels = -(expected * log_p + (1 - expected) * log_q).sum(dim=1)
        else:
            raise ValueError(f"unknown loss {kind!r}: choose one of {', '.join(LOSSES)}")
        if weights is not None:
            pixels = pixels * (weights[classes] if expected is None else (expected * weights[:, None, None]).sum(dim=1))
        return torch.where(valid, pixels, 0.0).sum()


def confident_cross_entropy_sum(
    outputs: Outputs, target: Tensor, gamma: float, weights: Tensor | None = None
) -> Tensor:
    """Summed ``-p_y^gamma log p_y``, where the weight ``p_y^gamma`` is taken as a constant (DST-CBC's dynamic weight).

    A pixel whose label the net doubts counts little: the net's prediction, also in the loss of a side output.
    ``target`` is a class map, ``weights`` as in :func:`cross_entropy_sum`; float32 scalar.
    """
    valid = target != IGNORE
    classes = torch.where(valid, target, 0)[:, None]
    chosen = [sharpened_log_probabilities(logits).gather(1, classes).squeeze(1) for logits in each(outputs)]
    weight = (gamma * chosen[0].detach()).exp()
    if weights is not None:
        weight = weight * weights[classes.squeeze(1)]
    return torch.stack([torch.where(valid, -weight * log_p, 0.0).sum() for log_p in chosen]).sum()


def probability_distance_sum(outputs: Outputs, target: Tensor, valid: Tensor) -> Tensor:
    """Squared distance of the prediction's probabilities from ``target`` [B,K,H,W]: mean over the classes, summed over
    the pixels of ``valid`` [B,H,W]; float32 scalar. The gradient flows into ``outputs`` alone."""
    logits = fused(outputs)
    with torch.autocast(logits.device.type, enabled=False):
        apart = torch.softmax(logits.float(), dim=1) - target.detach().float()
        return torch.where(valid, apart.square().mean(dim=1), 0.0).sum()


def mean_prediction(*predictions: Tensor) -> Tensor:
    """Log of the mean of the predictions' probabilities, float32 [B,K,H,W]: logits of their ensemble."""
    log_p = [sharpened_log_probabilities(logits) for logits in predictions]
    return reduce(torch.logaddexp, log_p) - math.log(len(log_p))


def log_complement(log_p: Tensor) -> Tensor:
    """``log(1 - p)`` of each class from log-probabilities [B,K,H,W] that sum to 1 over K.

    For the likeliest class it is the log of the others' sum: 1 - p itself is rounded away long before a confident
    mistake stops to matter (at T = 0.5 from a lead of 8 in the logits on).
    """
    top = log_p.argmax(dim=1, keepdim=True)
    others = log_p.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True)
    return log1mexp(log_p).scatter(1, top, others)


def log1mexp(log_p: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x <= 0 without cancellation; x within one float epsilon of 0 counts as that epsilon."""
    x = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def pixel_count(target: Tensor) -> Tensor:
    """How many pixels of ``target`` are not ignored: float32 scalar on its device (no host sync)."""
    valid = target.sum(dim=1) > 0 if target.is_floating_point() else target != IGNORE
    return valid.sum().float()


def pseudo_label(logits: Tensor, valid: Tensor, soft: bool = False) -> Tensor:
    """A target from a prediction: argmax, or softmax when ``soft``, ignored where the image has no data.

    The mask is the "Hadamard product of the predicted results and original images" of section 2.1.
    """
    if soft:
        return torch.softmax(logits.float(), dim=1) * valid[:, None]
    return torch.where(valid, logits.argmax(dim=1), IGNORE)


def ramp_up(step: int, start: int, ramp: int) -> float:
    """Learning-rate factor of a phase in round ``step``: 0 before ``start``, exp(-5(1-t)^2) along ``ramp``, then 1."""
    if step < start:
        return 0.0
    done = 1.0 if ramp == 0 else min(1.0, (step - start) / ramp)
    return math.exp(-5 * (1 - done) ** 2)
