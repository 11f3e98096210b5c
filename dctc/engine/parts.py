"""One part under training: its wrapper and its own optimizer, as each strategy of torch holds them.

One wrapper and one optimizer a part, because an update steps some parts only: a composite module under DDP would need
``find_unused_parameters``, and ZeRO would step the idle decoder (docs/training.md, "Strategies").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dctc.engine.optimizer import OptimizerSpec, step_at
from dctc.networks.block import Block


class Part:
    """A part in one process, and what the strategies below do alike.

    Attributes:
        module: what a method calls.
        optimizer: whose groups hold the learning rate.
    """

    def __init__(self, module: nn.Module, spec: OptimizerSpec) -> None:
        self.module = module
        self.optimizer = spec.build(module)

    @property
    def inner(self) -> nn.Module:
        """The module without a wrapper."""
        return self.module

    def zero_grad(self) -> None:
        """Before the first micro-batch of an update."""
        self.optimizer.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; ranks exchange gradients in the ``last`` one alone."""
        return nullcontext()

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the part's gradient over all ranks, float32 [], the same on each rank."""
        norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def scale_gradient(self, factor: Tensor | float) -> None:
        """Multiply the gradient by ``factor``."""
        gradients = [_local(p.grad) for p in self.module.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def is_finite(self) -> bool:
        """Whether this rank's parameters and buffers are; it waits for the device."""
        tensors = [_local(tensor.detach()) for tensor in (*self.inner.parameters(), *self.inner.buffers())]
        floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(floats, float("inf")))).all())

    def step(self, rate: float) -> None:
        """One optimizer step at ``rate`` times the learning rate."""
        step_at(self.optimizer, rate)

    def restart(self) -> None:
        """Forget the optimizer's moments, as if it had never stepped."""
        self.optimizer.state.clear()

    @torch.no_grad()
    def follow(self, leaders: Sequence[Part], keep: float) -> None:
        """Move weights and buffers towards those of ``leaders``, together of the same architecture; one strategy."""
        own, others = ([*parameters_of(parts), *buffers_of(parts)] for parts in ([self], leaders))
        follow([_local(tensor) for tensor in own], [_local(tensor) for tensor in others], keep)

    def full_precision(self) -> AbstractContextManager[None]:
        """Around forward passes without autocast."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters and buffers on the CPU; all ranks call it, rank 0 gets them."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            key: value
            for key, value in get_model_state_dict(self.module, options=options).items()
            if isinstance(value, Tensor)
        }

    @property
    def has_stepped(self) -> bool:
        """Whether there is an optimizer state yet: asking torch for one makes an untouched optimizer step."""
        return bool(self.optimizer.state)

    def state(self) -> dict[str, Any]:
        """``model`` and, once stepped, ``optimizer``, for torch.distributed.checkpoint; all ranks call it."""
        state = {"model": get_model_state_dict(self.module)}
        return state | {"optimizer": self.optimizer_state({})} if self.has_stepped else state

    def optimizer_state(self, sizes: dict[str, torch.Size]) -> dict[str, Any]:
        """The optimizer's state, or tensors for one to be loaded into. ``sizes``: path -> shape in the checkpoint."""
        return get_optimizer_state_dict(self.module, self.optimizer)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over what was loaded into :meth:`optimizer_state`."""
        set_optimizer_state_dict(self.module, self.optimizer, state)


class DistributedPart(Part):
    """In a DDP wrapper: each rank holds all, gradients are averaged over the ranks.

    Buffers are not broadcast before each forward: the updater averages them after each update.
    """

    def __init__(self, module: nn.Module, spec: OptimizerSpec, device: torch.device) -> None:
        self._wrapped = DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        super().__init__(self._wrapped, spec)

    @property
    def inner(self) -> nn.Module:
        """See :class:`Part`."""
        module: nn.Module = self._wrapped.module
        return module

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See :class:`Part`."""
        return nullcontext() if last else self._wrapped.no_sync()


class ShardedPart(Part):
    """FSDP2: each rank holds a share of every parameter and moment; blocks are gathered when they are needed.

    Every gather is undone right after the forward pass, also that of the whole part: pseudo-labels come from forward
    passes without a backward one, and what stayed gathered would miss the next optimizer step. There is no
    mixed-precision policy: autocast casts the gathered weights, and gradients are reduced in float32."""

    def __init__(self, module: nn.Module, spec: OptimizerSpec, mesh: DeviceMesh) -> None:
        for block in module.modules():
            if isinstance(block, Block):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        self._sharded: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        super().__init__(module, spec)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See :class:`Part`."""
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()


def parameters_of(parts: Iterable[Part]) -> list[Tensor]:
    """The parameters of all parts, in order."""
    return [parameter for part in parts for parameter in part.inner.parameters()]


def buffers_of(parts: Iterable[Part]) -> list[Tensor]:
    """The buffers of all parts, in order."""
    return [buffer for part in parts for buffer in part.inner.buffers()]


def follow(own: Sequence[Tensor], leaders: Sequence[Tensor], keep: float) -> None:
    """``keep * own + (1 - keep) * leader`` in place for floats; integers are copied."""
    pairs = list(zip(own, leaders, strict=True))
    floats = [(tensor, leader) for tensor, leader in pairs if tensor.is_floating_point()]
    if keep and floats:
        torch._foreach_lerp_([tensor for tensor, _ in floats], [leader for _, leader in floats], 1 - keep)
    for tensor, leader in pairs:
        if not keep or not tensor.is_floating_point():
            tensor.copy_(leader)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
