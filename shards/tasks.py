"""Run a pure function over many items: in this process or in several of this machine.

What runs tasks is an :class:`Engine`. The tasks of packing are picklable, write whole files or none, and write the same
bytes however often they run; so an engine owes no order, and may run a task again when it lost a worker.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TypeVar

from shards.errors import InputError
from shards.lifetime import leave_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Where tasks run."""

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], done: Callable[[Item, Result], None]
    ) -> None:
        """Call ``function`` on each item, in no promised order; ``done`` is told each item with its result.

        Raises:
            Exception: the first one that a call raises; calls that have not begun by then are given up.
            InputError: when workers are lost.
        """


@dataclass(frozen=True)
class Here:
    """This process."""

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], done: Callable[[Item, Result], None]
    ) -> None:
        """As :class:`Engine` says."""
        for item in items:
            done(item, function(item))


@dataclass(frozen=True)
class Processes:
    """Processes of this machine, which start with the first task and serve all further ones."""

    pool: ProcessPoolExecutor
    workers: int

    def run(
        self, function: Callable[[Item], Result], items: Sequence[Item], done: Callable[[Item, Result], None]
    ) -> None:
        """As :class:`Engine` says."""
        try:
            futures = {self.pool.submit(_call, function, item): item for item in items}
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BrokenProcessPool:
            raise InputError(
                "a worker process ended in the middle, perhaps killed for its memory; run the same command again to go "
                f"on, with fewer workers than {self.workers}"
            ) from None


@contextmanager
def local_engine(workers: int) -> Iterator[Engine]:
    """This process, or with more than one worker processes of this machine.

    What ends the block but is no ordinary error, such as KeyboardInterrupt, also stops the calls that are running, in
    such a way that they leave nothing half-written behind.
    """
    if workers <= 1:
        yield Here()
        return
    # Never fork: GDAL's threads and locks do not survive it.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        try:
            yield Processes(pool, workers)
        except BaseException as error:
            if not isinstance(error, Exception):
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    try:
        return function(item)
    except SystemExit:  # asked to stop; by now the call has removed what it had begun to write
        os._exit(1)


def _prepare() -> None:
    """Make a worker end when its parent is killed, or terminates it.

    Ctrl-C is the parent's to answer: it terminates the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    leave_with_parent()


def _stop(_: int, __: FrameType | None) -> None:
    raise SystemExit
