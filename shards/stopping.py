"""Ctrl-C and SIGTERM as one KeyboardInterrupt, whatever the code that it strikes makes of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

KINDS = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 10.0  # a launcher passes a Ctrl-C on that its processes have had already


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT or SIGTERM ends the block by a KeyboardInterrupt. For the main thread; a SIGINT that is ignored stays so.

    The interrupt may strike inside a library that is tidying up itself and fails for it with another error (rasterio's
    environments do): that error is the interrupt's doing and leaves as KeyboardInterrupt too. A signal within ten
    seconds of the first doesn't disturb what is being tidied up; a later one interrupts again, for a library may have
    lost the first.

    Raises:
        KeyboardInterrupt: a signal came.
    """
    first: float | None = None

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None or now - first > ECHO_S:
            first = now if first is None else first
            raise KeyboardInterrupt

    before = {kind: signal.getsignal(kind) for kind in KINDS}
    for kind in KINDS:
        if before[kind] is not signal.SIG_IGN:
            signal.signal(kind, stop)
    try:
        yield
    except Exception:
        if first is None:
            raise
        raise KeyboardInterrupt from None
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
