"""Mixed precision of the forward passes."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Precision:
    """``fp32`` or ``bf16`` autocast; weights, gradients, moments and losses stay float32.

    A new context for each forward: autocast caches cast weights inside one, and a cast made without gradients must not
    be found by the forward that needs them.
    """

    def __init__(self, dtype: str, device: torch.device, channels_last: bool = False) -> None:
        self.device = device
        self.dtype = DTYPES[dtype]
        no_tf32()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """The context for one forward."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def lay_out(self, module: nn.Module) -> nn.Module:
        """The module's weights in the chosen memory format."""
        return module.to(memory_format=self.memory_format)  # type: ignore[call-overload,no-any-return]  # stub lacks it


def no_tf32() -> None:
    """Make float32 mean float32 on CUDA: convolutions use TF32 by default there."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
