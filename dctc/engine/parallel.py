"""Ranks, devices and strategies. Accelerate brings up the processes; each part gets its own wrapper (``parts``)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from dctc.engine import zero
from dctc.engine.heartbeat import Heartbeat, Peer
from dctc.engine.optimizer import OptimizerSpec
from dctc.engine.parts import DistributedPart, Part, ShardedPart
from dctc.engine.precision import Precision
from shards.errors import InputError

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
ZERO = {f"zero{stage}": stage for stage in zero.STAGES}
SHARDING = ("fsdp2", *ZERO)
STRATEGIES = ("none", "ddp", "fsdp2", *ZERO)
STARTING = 1800.0  # seconds that a collective call may take until the first round is over: compilation, slow disks
LEAVING = 5.0
# What accelerate's launcher says of a strategy. Its own wrapping is not used: it has one optimizer for everything.
_FSDP, _DEEPSPEED, _DEEPSPEED_FILE = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
)


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for.

    Attributes:
        strategy: fsdp2, zero1, zero2, zero3; None where it leaves that open.
        source: the file or variable that said so.
        zero: DeepSpeed's settings.
    """

    strategy: str | None = None
    source: str = ""
    zero: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Launch:
        """From the variables that ``accelerate launch`` sets.

        Raises:
            InputError: FSDP1, or a DeepSpeed file that cannot work.
        """
        if environment.get(_FSDP, "").lower() == "true":
            if environment.get("FSDP_VERSION", "1") != "2":
                raise InputError("the launch file asks for FSDP 1: write fsdp_version: 2, or use launch/fsdp2.yaml")
            return cls("fsdp2", "the launch file")
        if environment.get(_DEEPSPEED, "").lower() == "true":
            file = environment.get(_DEEPSPEED_FILE, "")
            if file not in ("", "none"):
                settings = zero.read_settings(Path(file))
                return cls(f"zero{settings['zero_optimization']['stage']}", file, settings)
            stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
            if f"zero{stage}" not in ZERO:
                raise InputError(f"the launch file asks for ZeRO stage {stage}: choose one of launch/zero1-3.yaml")
            return cls(f"zero{stage}", "the launch file", zero.default_settings(int(stage)))
        return cls()


class Parallel:
    """The processes of a run, as they came up.

    Args:
        strategy: "auto" or one of :data:`STRATEGIES`; it must fit what was launched.
        timeout: seconds after which a collective call that some rank does not join fails, from the second round on.

    Attributes:
        strategy: one of :data:`STRATEGIES`.
        rank, world: of this process.
        device: where this rank computes.
        hosts: the host of each rank.

    Raises:
        InputError: what was asked for and what came up differ.
    """

    def __init__(self, strategy: str = "auto", timeout: float = STARTING) -> None:
        launch = Launch.read(os.environ)
        # Autocast is ours: what a launch file or a user's default says of precision must not reach in here.
        with _without(_FSDP, _DEEPSPEED):
            accelerator = Accelerator(
                mixed_precision="no",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=max(timeout, STARTING)))],
            )
        self._accelerator = accelerator
        self._timeout = timeout
        self.heartbeat: Heartbeat | None = None
        try:
            self._take(accelerator, strategy, launch)
        except InputError:
            self.close()
            raise

    def _take(self, accelerator: Accelerator, strategy: str, launch: Launch) -> None:
        if accelerator.distributed_type not in PLAIN:
            raise InputError(
                f"the launch file asks for {accelerator.distributed_type.value}, which parallel.strategy does not "
                "offer: use a file of launch/"
            )
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.strategy = _agreed(strategy, launch, self.world)
        self._zero_settings = launch.zero or (
            zero.default_settings(ZERO[self.strategy]) if self.strategy in ZERO else {}
        )
        self.hosts = [socket.gethostname()]
        self.control: dist.ProcessGroup | None = None
        self.storage: dist.ProcessGroup | None = None
        if self.world > 1:
            timeout = timedelta(seconds=max(self._timeout, STARTING))
            self.control = dist.new_group(backend="gloo", timeout=timeout)
            self.storage = dist.new_group(backend="gloo", timeout=timeout)
            peers = self.gather(Peer.this())
            self.hosts = [peer.host for peer in peers]
            self.heartbeat = Heartbeat(self.rank, peers)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def part(self, module: nn.Module, spec: OptimizerSpec, precision: Precision, offload: bool = False) -> Part:
        """The module on this rank's device, in the strategy's wrapper, with its own optimizer.

        Raises:
            InputError: DeepSpeed is missing.
        """
        module = module.to(self.device)
        if self.strategy == "ddp":
            return DistributedPart(module, spec, self.device)
        if self.strategy in SHARDING:  # which needs contiguous weights: channels_last is the images' layout alone
            module = module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # stub lacks it
        if self.strategy == "fsdp2":
            return ShardedPart(module, spec, init_device_mesh(self.device.type, (self.world,)))
        if self.strategy in ZERO:
            return zero.ZeroPart(module, spec, precision, self._zero_settings, offload)
        return Part(module, spec)

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
        """Whether any rank says so. All ranks must ask. Between the hosts alone: no GPU waits for it."""
        if self.world == 1:
            return flag
        box = torch.tensor(float(flag))
        dist.all_reduce(box, group=self.control)
        return bool(box.item())

    def from_main(self, value: Any) -> Any:
        """Rank 0's value of a picklable object, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value of a picklable object, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def started(self) -> None:
        """The first round is over: from now on a call that a rank does not join fails after the shorter timeout."""
        for group in _world.pg_map:  # DeepSpeed has some of its own
            if group is not self.storage:  # a slow disk is no lost rank
                _set_pg_timeout(timedelta(seconds=self._timeout), group)

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Bad input met inside is this rank's own: other ranks read other tiles. It is told with the rank's name."""
        try:
            yield
        except InputError as error:
            if self.world > 1:
                error.add_note(f"rank {self.rank} on {self.hosts[self.rank]}")
            raise

    def wait(self) -> None:
        """A barrier."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def __enter__(self) -> Parallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(in_order=kind is None)

    def close(self, in_order: bool = True) -> None:
        """Leave the process group: a process that ends inside it may abort, whatever it has to say.

        After an error the others may be in a collective call that this rank will never join, and NCCL would wait for
        them: then leaving has :data:`LEAVING` seconds.
        """
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.heartbeat = None
        if in_order:
            self._accelerator.end_training()
            return
        leaving = threading.Thread(target=self._accelerator.end_training, daemon=True)
        leaving.start()
        leaving.join(timeout=LEAVING)


def _agreed(strategy: str, launch: Launch, world: int) -> str:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world:
        raise InputError(
            f"{launched} processes were launched but accelerate made {world} rank(s), so they would train "
            "apart: on a machine without GPUs set ACCELERATE_USE_CPU=true and use launch/cpu_pair.yaml"
        )
    if launch.strategy is not None:
        if strategy not in ("auto", launch.strategy):
            raise InputError(
                f"parallel.strategy is {strategy}, but {launch.source} asks for {launch.strategy}: "
                "launch with the matching file of launch/, or leave parallel.strategy at auto"
            )
        strategy = launch.strategy
    came_up = "ddp" if world > 1 else "none"
    if strategy == "auto":
        return came_up
    if (strategy == "none") != (world == 1):
        raise InputError(
            f"parallel.strategy is {strategy}, but {world} process(es) came up, which is {came_up}: "
            "launch with the matching file of launch/, or leave parallel.strategy at auto"
        )
    return strategy


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Environment variables hidden for a while."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
