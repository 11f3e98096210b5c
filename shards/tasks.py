"""Run a pure function over many items, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from typing import TypeVar

Item = TypeVar("Item")
Done = Callable[[int], None]


def run_tasks(function: Callable[[Item], object], items: Sequence[Item], workers: int, done: Done) -> None:
    """Call ``function`` on each item, in no promised order; ``done(n)`` is told after each how many are finished.

    Raises:
        Exception: the first one that a call raises; calls that have not begun by then are given up.
    """
    if workers <= 1 or len(items) <= 1:
        for number, item in enumerate(items, start=1):
            function(item)
            done(number)
        return
    # Never fork: GDAL's threads and locks do not survive it.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_follow_parent) as pool:
        try:
            futures = [pool.submit(function, item) for item in items]
            for number, future in enumerate(as_completed(futures), start=1):
                future.result()
                done(number)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow_parent() -> None:
    """End this worker when its parent is killed, which would otherwise leave it waiting for work for ever.

    Ctrl-C is the parent's to answer: it lets the running tasks finish and gives up the rest.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
