"""ZeRO by DeepSpeed: one engine a part. No other module imports DeepSpeed.

Checkpoints of these parts have the format of all others: whole tensors, gathered from the engines. DeepSpeed's own
format can only be read by the same stage on the same number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dctc.engine.optimizer import OptimizerSpec, step_at
from dctc.engine.parts import Part, buffers_of, follow, parameters_of
from dctc.engine.precision import Precision
from shards.errors import InputError

STAGES = (1, 2, 3)
# What an engine must not do, because the updater does it: it accumulates and scales the loss itself.
OWNED = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
_MEBI = 2**20
_BUCKET = 50 * _MEBI  # elements; "auto" would need a transformer's hidden size


def default_settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings for a stage, without a launch file's JSON: what ``launch/zeroN.json`` says."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    zero |= {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        }
    return {**OWNED, "zero_optimization": zero}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a DeepSpeed JSON.

    Raises:
        InputError: for a file that cannot be read, no ZeRO stage, or a key that belongs into a run's config.
    """
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
        stage = settings["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a DeepSpeed configuration with zero_optimization.stage ({error!r})") from None
    if stage not in STAGES:
        raise InputError(f"{path}: zero_optimization.stage is {stage}; there are 1, 2 and 3 (launch/ddp.yaml for 0)")
    config_keys = {
        "gradient_clipping": "optimizer.clip", "optimizer": "optimizer.*", "scheduler": "schedule.*",
        "fp16": "precision.dtype", "bf16": "precision.dtype", "torch_autocast": "precision.dtype",
        "train_batch_size": "data.batch_labelled",
    }  # fmt: skip
    for key, ours in config_keys.items():
        if key in settings:
            raise InputError(f"{path}: {key} is for the run's config to say, as {ours}: remove it here")
    for key, value in OWNED.items():
        if settings.get(key, value) != value:
            raise InputError(f"{path}: {key} must be {value}: the trainer cuts batches itself (parallel.accumulation)")
    return settings


class ZeroPart(Part):
    """A part in a DeepSpeed engine.

    Args:
        settings: of :func:`read_settings` or :func:`default_settings`.
        offload: keep the optimizer's state, and at stage 3 the parameters, in the host's memory.
    """

    def __init__(
        self, module: nn.Module, spec: OptimizerSpec, precision: Precision, settings: Mapping[str, Any], offload: bool
    ) -> None:
        deepspeed = _deepspeed()
        super().__init__(module, spec)
        self._plain = module
        self._names = [name for name, _ in module.named_parameters()]
        with _quiet():
            engine, optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=_whole_settings(settings, spec, precision, offload),
                dist_init_required=False,
            )
        self.module: nn.Module = engine
        self._engine: Any = engine
        self._zero: Any = optimizer
        self.stage: int = settings["zero_optimization"]["stage"]

    @property
    def inner(self) -> nn.Module:
        """See :class:`Part`; at stage 3 its parameters are shares."""
        return self._plain

    def zero_grad(self) -> None:
        """The engine does so in each step."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See :class:`Part`."""
        self._engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def gradient_norm(self) -> Tensor:
        """Of the last step, before clipping: the engine computes it there."""
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)

    def step(self, rate: float) -> None:
        """See :class:`Part`; the engine clips."""
        step_at(_Steps(self._engine, self.optimizer), rate)  # type: ignore[arg-type]  # has what it needs of one

    def restart(self) -> None:
        """See :class:`Part`; moments of 0 after 0 steps are those of an optimizer that never stepped."""
        for flat in self._flats():
            for key, value in self._zero.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value):
                    value.zero_()
                elif key == "step":
                    self._zero.optimizer.state[flat][key] = 0

    @torch.no_grad()
    def follow(self, leaders: Sequence[Part], keep: float) -> None:
        """See :class:`Part`. At stage 3 rank 0's result is dealt out to all; the others compute the same."""
        if self.stage < 3:
            super().follow(leaders, keep)
        else:
            import deepspeed

            own, others = parameters_of([self]), parameters_of(leaders)
            with deepspeed.zero.GatheredParameters(others), deepspeed.zero.GatheredParameters(own, modifier_rank=0):
                follow(own, others, keep)
            follow(buffers_of([self]), buffers_of(leaders), keep)
        self._zero.refresh_fp32_params()  # its copy of the weights, from which the next step would start

    def is_finite(self) -> bool:
        """See :class:`Part`."""
        norms = torch._foreach_norm([flat.detach() for flat in self._flats()], float("inf"))
        buffers = all(bool(b.isfinite().all()) for b in self._plain.buffers() if b.is_floating_point())
        return buffers and bool(torch.isfinite(torch.stack(norms)).all())

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """See :class:`Part`: the engine has autocast of its own."""
        settings = self._engine._config
        before = settings.torch_autocast_enabled
        settings.torch_autocast_enabled = False
        try:
            yield
        finally:
            settings.torch_autocast_enabled = before

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Part`."""
        with self._gathered():
            return {name: tensor.detach().cpu().clone() for name, tensor in self._plain.state_dict().items()}

    @property
    def has_stepped(self) -> bool:
        """See :class:`Part`."""
        return bool(self._zero.optimizer.state) and bool(self._moments())

    def state(self) -> dict[str, Any]:
        """See :class:`Part`. Each tensor is kept by one rank in turn, so that all of them share the writing."""
        mine = _Turns()
        state: dict[str, Any] = {"model": {k: t for k, t in self.weights().items() if mine()}}
        if not self.has_stepped:
            return state
        import deepspeed

        moments: dict[str, dict[str, Any]] = {}
        for name, parameter in zip(self._names, self._plain.parameters(), strict=True):
            for key in self._moments():
                whole = deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                if mine():
                    moments.setdefault(name, {})[key] = whole.cpu().view(_shape(parameter))
            if (step := self._steps_done()) is not None and mine():
                moments.setdefault(name, {})["step"] = step.detach().cpu().clone()
        group = {key: value for key, value in self._zero.param_groups[0].items() if key != "params"}
        group = {key: value for key, value in group.items() if not torch.is_tensor(value)}
        state["optimizer"] = {"state": moments, "param_groups": [group | {"params": self._names}]}
        return state

    def optimizer_state(self, sizes: dict[str, torch.Size]) -> dict[str, Any]:
        """See :class:`Part`."""
        state: dict[str, dict[str, Tensor]] = {}
        for name in self._names:
            prefix = f"state.{name}."
            found = {path.removeprefix(prefix): size for path, size in sizes.items() if path.startswith(prefix)}
            state[name] = {key: torch.empty(size) for key, size in found.items() if "." not in key}
        return {"state": state}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """See :class:`Part`."""
        import deepspeed

        moments: dict[str, dict[str, Tensor]] = state["state"]
        keys = sorted({key for of in moments.values() for key in of} - {"step"})
        for flat in self._flats():
            entry = self._zero.optimizer.state[flat]
            entry |= {key: torch.zeros_like(flat) for key in keys}
            steps = [of["step"] for of in moments.values() if "step" in of]
            if steps:
                fused = self._zero.param_groups[0].get("fused")  # whose kernels want it beside the moments
                entry["step"] = steps[0].to(flat.device if fused else "cpu", copy=True)
        if self.stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in zip(self._names, self._plain.parameters(), strict=True):
            for key in keys:
                value = moments[name][key].to(self._zero.device if self.stage < 3 else _device_of(parameter))
                if self.stage < 3:
                    deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)
                else:
                    deepspeed.utils.safe_set_local_optimizer_state(parameter, _share(value, parameter), key)

    def _flats(self) -> list[Tensor]:
        """The flat float32 shares of this rank that the inner optimizer steps."""
        groups = (
            self._zero.single_partition_of_fp32_groups if self.stage < 3 else self._zero.fp32_partitioned_groups_flat
        )
        return list(groups)

    def _moments(self) -> list[str]:
        first = self._flats()[0]
        entry = self._zero.optimizer.state.get(first, {})
        return sorted(key for key, value in entry.items() if torch.is_tensor(value) and value.shape == first.shape)

    def _steps_done(self) -> Tensor | None:
        step = self._zero.optimizer.state[self._flats()[0]].get("step")
        return step if step is None or torch.is_tensor(step) else torch.tensor(float(step))

    def _gathered(self) -> AbstractContextManager[object]:
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(self._plain.parameters()))
        return gathered


class _Steps:
    """An engine where :func:`step_at` expects an optimizer."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups
        self.step = engine.step


class _Turns:
    """True for each rank in turn."""

    def __init__(self) -> None:
        self._count, self._world, self._rank = -1, dist.get_world_size(), dist.get_rank()

    def __call__(self) -> bool:
        self._count += 1
        return self._count % self._world == self._rank


def _whole_settings(
    settings: Mapping[str, Any], spec: OptimizerSpec, precision: Precision, offload: bool
) -> dict[str, Any]:
    zero = dict(settings["zero_optimization"])
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": precision.device.type == "cuda"}
        if zero["stage"] == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": precision.device.type == "cuda"}
    return {
        **settings,
        **OWNED,
        "zero_optimization": zero,
        "gradient_clipping": spec.clip or 0.0,  # left out, it would be 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": precision.dtype != torch.float32,
            "dtype": str(precision.dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [],  # of whose gradients the exchange would be rounded, too
        },
    }


def _deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        with _quiet():
            import deepspeed
            from deepspeed.utils import logger

            if os.environ["DS_ACCELERATOR"] == "cpu":
                # Otherwise it compiles a minute of C++, for an all-reduce of its inference engine.
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    except ImportError as error:
        raise InputError(f"ZeRO needs DeepSpeed ({error}): pip install -c constraints.txt -e '.[deepspeed]'") from None
    logger.setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints and logs what it builds; an error keeps its traceback."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _device_of(parameter: nn.Parameter) -> torch.device:
    device: torch.device = getattr(parameter, "ds_tensor", parameter).device
    return device


def _share(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's share of a stage-3 parameter's tensor, padded as DeepSpeed pads."""
    size: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]  # DeepSpeed puts it there
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)
