"""Mixed precision of the forward passes, and the one loss scale that fp16 needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UnsupportedPrecision(ValueError):
    """This device cannot compute in the precision that was asked for; the message says what it can."""


@dataclass
class LossScale:
    """The dynamic loss scale of fp16, one for all parts: an update with several optimizers has one backward pass.

    Grows after ``interval`` updates without overflow, shrinks at each overflow, which also skips the update. The same
    rule and constants as ``torch.amp.GradScaler``; that class unscales the second optimizer of a step twice.

    Attributes:
        value: what a loss is multiplied with before its backward pass.
        since: updates without overflow since the last change.
    """

    value: float = 2.0**16
    since: int = 0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def update(self, finite: bool) -> None:
        """After each update, with whether its gradients were finite on all ranks."""
        if not finite:
            self.value *= self.backoff
            self.since = 0
            return
        self.since += 1
        if self.since == self.interval:
            self.value *= self.growth
            self.since = 0


class Precision:
    """Autocast of the forward passes; weights, gradients, moments and losses stay float32.

    A new context for each forward: autocast caches cast weights inside one, and a cast made without gradients must not
    be found by the forward that needs them.

    Args:
        dtype: ``fp32``, ``tf32`` (float32 with TF32 tensor cores), ``bf16`` or ``fp16`` (with a loss scale).
        device: where the networks are.
        channels_last: lay weights and images out so.

    Raises:
        UnsupportedPrecision: the device has no such arithmetic.
    """

    def __init__(self, dtype: str, device: torch.device, channels_last: bool = False) -> None:
        self.name = dtype
        self.device = device
        self.dtype = DTYPES[dtype]
        no_tf32()
        if dtype == "tf32":
            _allow_tf32(device)
        if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UnsupportedPrecision(f"{_name(device)} has no bf16 arithmetic (Ampere and later have): use fp16")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.loss_scale = LossScale() if dtype == "fp16" else None

    def autocast(self) -> torch.autocast:
        """The context for one forward."""
        lower = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if lower else torch.bfloat16, enabled=lower)

    def lay_out(self, module: nn.Module) -> nn.Module:
        """The module's weights in the chosen memory format."""
        return module.to(memory_format=self.memory_format)  # type: ignore[call-overload,no-any-return]  # stub lacks it


def no_tf32() -> None:
    """Make float32 mean float32 on CUDA: convolutions use TF32 by default there."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _allow_tf32(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UnsupportedPrecision(f"{_name(device)} has no TF32 tensor cores (Ampere and later have): use fp32")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type} device"
