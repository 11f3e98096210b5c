"""What ends a run before its time, in words that help; and what keeps two runs out of one folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import torch

from dctc.config import Config
from dctc.engine.checkpoint import CheckpointError
from dctc.engine.parallel import Parallel
from shards.errors import InputError

LAUNCHER = "DCTC_LAUNCHER"  # the process id of another one that starts runs, and with which they are to end
LOCK = ".lock"
# Seconds that an earlier run in the same folder has to end. NFS keeps the lock of a dead machine for about 90.
LOCK_WAIT = float(os.environ.get("DCTC_LOCK_WAIT", "120"))
_PR_SET_PDEATHSIG = 1
_COLLECTIVE = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out", "broken pipe")


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher that started this process dies, however it does (Linux).

    Its ranks are no children of the shell's job: without this they would train on, beside whoever starts the run again.
    """
    parent = psutil.Process().parent()
    if parent is None or not sys.platform.startswith("linux"):
        return
    launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER) == str(parent.pid)
    launched = launched or any("accelerate" in word for word in parent.cmdline())
    if launched:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent.pid:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)


def occupy(folder: Path, parallel: Parallel) -> None:
    """Lock a run's folder, if it exists, for as long as this process lives. All ranks call it.

    Raises:
        InputError: another process holds it, and goes on holding it for :data:`LOCK_WAIT` seconds.
    """
    holder = parallel.from_main(_lock(folder / LOCK) if parallel.is_main and folder.is_dir() else None)
    if holder is not None:
        raise InputError(f"{folder}: {holder} is training in this folder: wait for it, or choose another run.name")


_held: dict[Path, IO[str]] = {}  # closing a file gives its lock up


def _lock(path: Path) -> str | None:
    """Who holds it; None when this process does."""
    if path in _held:
        return None
    file = path.open("a+")
    deadline = time.monotonic() + LOCK_WAIT
    told = False
    while not _locked(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        if time.monotonic() > deadline:
            return holder
        if not told:
            print(f"{path.parent}: waiting up to {LOCK_WAIT:.0f} s for {holder} to end", flush=True)
            told = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    _held[path] = file
    return None


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"warning: {file.name}: this file system has no locks, so nothing keeps a second run out", flush=True)
    return True


@contextmanager
def explained(parallel: Parallel, config: Config) -> Iterator[None]:
    """Around a run: an error with a remedy, or that another rank caused, ends with a line that says so.

    Raises:
        SystemExit: with code 1, after the traceback and that line, where :func:`explain` knows one.
    """
    try:
        yield
    except InputError as error:
        show_input_error(error)  # now: leaving a group whose other ranks train on may take its time
        raise
    except Exception as error:
        told = explain(error, parallel, config)
        if told is None:
            raise
        traceback.print_exc()
        print(f"error: {told}", file=sys.stderr, flush=True)
        if parallel.world > 1:
            os._exit(1)  # a group that has lost a rank cannot be left in good order
        raise SystemExit(1) from None


_shown: list[InputError] = []


def show_input_error(error: InputError) -> None:
    """One line on stderr, once; what every rank of a machine found is said by the first of them."""
    if error in _shown:
        return
    _shown.append(error)
    found_by = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    if found_by or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {found_by}{error.message}", file=sys.stderr)


def explain(error: BaseException, parallel: Parallel, config: Config) -> str | None:
    """One line on an error that has a remedy, or that another rank caused; None for any other one.

    It may wait for half a minute, until the heartbeat knows which rank is gone.
    """
    if isinstance(error, CheckpointError | FloatingPointError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or f"{config.run.output}, or the standard output"
        return f"{where}: no space is left there: make room; the same command goes on from the latest checkpoint"
    if _out_of_memory(error):
        return _remedies(parallel, config)
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return (
            "batch norm has nothing to average: the deepest map of a micro-batch is a single pixel of a single tile: "
            "more tiles at once (a larger data.batch_labelled and data.batch_unlabelled, less parallel.accumulation), "
            "larger tiles, or network.norm=group"
        )
    collective = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _COLLECTIVE)
    if parallel.world > 1 and collective:
        return lost_rank(parallel)
    return None


def lost_rank(parallel: Parallel) -> str:
    """Which rank a collective call failed for."""
    gone = parallel.heartbeat.verdict() if parallel.heartbeat is not None else None
    if gone is None:
        return (
            f"rank {parallel.rank}: a collective call failed although every rank gives signs of life; see the first "
            "error of any rank, and docs/operations.md, debug a hang"
        )
    return f"rank {parallel.rank}: {gone}; the same command goes on from the latest checkpoint"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Of the CPU; of CUDA and NCCL; of cuDNN, cuBLAS; of oneDNN, which says no more where it gets no memory.
    words = ("can't allocate memory", "out of memory", "alloc_failed", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _remedies(parallel: Parallel, config: Config) -> str:
    ranks, micro = parallel.world, config.parallel.accumulation
    tiles = max(config.data.batch_labelled, config.data.batch_unlabelled) // (ranks * micro)
    remedies = []
    if tiles > 1:
        remedies.append(
            f"parallel.accumulation={micro * 2} (now {micro}: {tiles} tiles at once; the result stays the same)"
        )
    if not config.parallel.activation_checkpointing:
        remedies.append("parallel.activation_checkpointing=true (the result stays the same)")
    if config.precision.dtype in ("fp32", "tf32"):
        remedies.append("precision.dtype=bf16")
    if ranks > 1 and parallel.strategy == "ddp":
        remedies.append("launch/fsdp2.yaml instead of launch/ddp.yaml")
    remedies.append("a smaller data.batch_labelled, data.batch_unlabelled or network.width")
    memory = "of the GPU" if parallel.device.type == "cuda" else "of this machine"
    return (
        f"rank {parallel.rank}: the memory {memory} is full. Try in this order: {'; '.join(remedies)}. "
        "`dctc train CONFIG --find-batch-size` measures what fits"
    )
