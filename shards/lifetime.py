"""Worker processes that end with the process that they work for."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def leave_with_parent() -> None:
    """End this process when the one that started it ends, however that happens; for processes of multiprocessing.

    A worker of a fork server never sees its parent go: the server is alive as long as the worker is.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
