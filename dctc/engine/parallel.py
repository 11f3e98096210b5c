"""Ranks, devices and wrapped parts. Accelerate brings up the processes; each part gets its own wrapper.

One wrapper a part, because an update steps some parts only: a composite module under DDP would need
``find_unused_parameters`` and would still touch the idle decoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards.errors import InputError

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Parallel:
    """The processes of a run, as they came up.

    Attributes:
        strategy: "none" or "ddp".
        rank, world: of this process.
        device: where this rank computes.
    """

    def __init__(self, strategy: str = "auto") -> None:
        # Autocast is ours: what a launch file or a user's default says of precision must not reach in here.
        accelerator = Accelerator(mixed_precision="no")
        self._accelerator = accelerator
        try:
            self._take(accelerator, strategy)
        except InputError:
            self.close()
            raise

    def _take(self, accelerator: Accelerator, strategy: str) -> None:
        if accelerator.distributed_type not in PLAIN:
            raise InputError(
                f"the launch file asks for {accelerator.distributed_type.value}, which parallel.strategy does not "
                "offer: use a file of launch/"
            )
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.strategy = self._agreed(strategy)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def _agreed(self, strategy: str) -> str:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world:
            raise InputError(
                f"{launched} processes were launched but accelerate made {self.world} rank(s), so they would train "
                "apart: on a machine without GPUs set ACCELERATE_USE_CPU=true and use launch/cpu_pair.yaml"
            )
        came_up = "ddp" if self.world > 1 else "none"
        if strategy not in ("auto", came_up):
            raise InputError(
                f"parallel.strategy is {strategy}, but {self.world} process(es) came up, which is {came_up}: "
                "launch with the matching file of launch/, or leave parallel.strategy at auto"
            )
        return came_up

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this rank's device, in its own DDP wrapper when there are several ranks.

        Buffers are not broadcast before each forward: :meth:`average_buffers` keeps them equal after each update.
        """
        module = module.to(self.device)
        if self.strategy == "none":
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    @contextmanager
    def gradients_stay_local(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """No gradient exchange inside: for all micro-batches but the last."""
        with ExitStack() as stack:
            for module in modules:
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Give every rank the mean of the batch-norm statistics, so that evaluation is the same on all of them."""
        if self.world == 1:
            return
        layers = [layer for module in modules for layer in module.modules() if type(layer) is nn.BatchNorm2d]
        buffers = [b for layer in layers for b in (layer.running_mean, layer.running_var) if b is not None]
        if buffers:
            flat = self.sum(torch.cat(buffers)) / self.world
            for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
                buffer.copy_(mean)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. All ranks must ask."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def from_main(self, value: Any) -> Any:
        """Rank 0's value of a picklable object, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """A barrier."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside its wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module
