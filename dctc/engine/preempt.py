"""Asked to stop: a flag that signals set, looked at once a round."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1; the second SIGINT stops at once.

    Install it once, in the main thread, before the first round.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
