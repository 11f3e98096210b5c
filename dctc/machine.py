"""What this machine has, and what that means for training on it (``dctc doctor``)."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import rasterio
import torch
import yaml

from shards.errors import InputError

PACKAGES = ("dctc", "torch", "accelerate", "deepspeed", "webdataset", "rasterio", "mlflow", "numpy", "kornia")
SMALL_DISK_GIB, SMALL_SHM_GIB = 10, 1


def examine() -> dict[str, Any]:
    """``facts``: what was found, by name; ``to_fix``: sentences, empty when nothing stands in the way."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu cores": len(os.sched_getaffinity(0)),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
        "GPUs": _gpus(),
        "bf16 on the GPU": torch.cuda.is_bf16_supported() if torch.cuda.is_available() else None,
        "NCCL": torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_gloo_available(),
        "GDAL": rasterio.__gdal_version__,
        "MLflow server": os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db beside the runs (default)"),
    }
    facts |= {name: _version(name) for name in PACKAGES}
    return {"facts": facts, "to_fix": _advice(facts)}


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _advice(facts: dict[str, Any]) -> list[str]:
    advice = []
    if not facts["GPUs"]:
        driver = Path("/proc/driver/nvidia/version").exists()
        advice.append(
            "an NVIDIA driver is loaded but torch sees no GPU: install a CUDA build of torch"
            if driver
            else "no GPU: training runs on CPU; use a small network.width and precision.dtype=bf16"
        )
    if shutil.disk_usage(Path.cwd()).free < SMALL_DISK_GIB * 2**30:
        advice.append(f"less than {SMALL_DISK_GIB} GiB free here: packing needs twice the size of the dataset")
    shm = Path("/dev/shm")
    if shm.exists() and shutil.disk_usage(shm).total < SMALL_SHM_GIB * 2**30:
        advice.append(
            "/dev/shm is below 1 GiB: loader workers (data.workers) may fail; start the container with --shm-size=8g"
        )
    if importlib.util.find_spec("deepspeed") is not None and importlib.util.find_spec("transformers") is None:
        advice.append("deepspeed without transformers: accelerate cannot use it; pip install 'dctc[deepspeed]'")
    return advice


def launcher(launch: Path | None) -> tuple[list[str], int]:
    """Python's arguments that start the trainer as a launch file says, and how many processes that makes.

    Raises:
        InputError: there is no such file, it is no YAML, or it wants GPUs and there is none.
    """
    script = str(Path(__file__).with_name("train.py"))
    if launch is None:
        return [script], 1
    if not launch.is_file():
        raise InputError(f"{launch}: no such launch file; see launch/README.md")
    try:
        named = yaml.safe_load(launch.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{launch}: not valid YAML: {error}") from None
    count: list[str] = []
    world = named.get("num_processes") if isinstance(named, dict) else None
    if world is None:  # the file leaves the number to the machine: one process a GPU
        world = torch.cuda.device_count()
        count = ["--num_processes", str(world)]
        if not world:
            raise InputError(
                f"{launch}: leaves the number of processes to the GPUs, and there is none; see launch/README.md"
            )
    return ["-m", "accelerate.commands.launch", "--config_file", str(launch), *count, script], int(world)
