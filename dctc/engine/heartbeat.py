"""Signs of life: a rank that is gone is named, and the others do not wait for it for ever.

A thread of each rank counts up a key of its own in the store of the rendezvous and watches the next rank's, round the
ring, so that a thousand ranks cost the store no more than a few keys each every two seconds.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stub does not list it
from torch.distributed.distributed_c10d import PrefixStore, Store

INTERVAL = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one after which a rank counts as gone
GRACE = 20.0  # seconds that this rank's own error has to end it, once another one is gone
LOST = "dctc/lost"
STORE = "the store of the rendezvous"


@dataclass(frozen=True)
class Peer:
    """The process of a rank.

    Attributes:
        host: its name.
        namespace: of its process id: containers on one host have their own.
        process: its id there.
    """

    host: str
    namespace: str
    process: int

    @classmethod
    def this(cls) -> Peer:
        """This process."""
        return cls(socket.gethostname(), str(Path("/proc/self/ns/pid").readlink()), os.getpid())

    def has_ended(self, here: Peer) -> bool:
        """Whether it is known to have ended, by a process that can see it."""
        if (self.host, self.namespace) != (here.host, here.namespace):
            return False
        try:
            return psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Heartbeat:
    """The thread of one rank. After :data:`SILENCE` + :data:`GRACE` seconds without a rank, no other one lives.

    Args:
        rank: of this process.
        peers: who each rank is, in the order of ranks.
    """

    def __init__(self, rank: int, peers: Sequence[Peer]) -> None:
        self._rank, self._peers = rank, list(peers)
        # A launcher that starts its ranks again keeps its store, with what the last ones left there.
        self._store = PrefixStore(f"beats/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _store())
        self._ended = threading.Event()
        self._lost: str | None = None
        self._answered = time.monotonic()  # when the store last did
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_store, name="store watch", daemon=True).start()

    def stop(self) -> None:
        """This rank ends in good order: it says so to the one that watches it."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join(timeout=2 * INTERVAL)

    def verdict(self, wait: float = SILENCE + 2 * INTERVAL) -> str | None:
        """The rank that is gone, by number, host and process; None when all give signs of life after ``wait`` s."""
        deadline = time.monotonic() + wait
        while self._lost is None and time.monotonic() < deadline:
            if (gone := self._gone_from_this_host()) is not None:
                return gone
            time.sleep(0.1)
        return self._lost

    def _run(self) -> None:
        neighbour = (self._rank + 1) % len(self._peers)
        count, seen, changed = 0, "", time.monotonic()
        try:
            while not self._ended.wait(INTERVAL):
                count += 1
                self._store.set(f"dctc/beat/{self._rank}", str(count))
                if self._store.check([LOST]):
                    self._end(self._store.get(LOST).decode())
                key = f"dctc/beat/{neighbour}"
                beat = self._store.get(key).decode() if self._store.check([key]) else ""
                if beat != seen or beat == "end":
                    seen, changed = beat, time.monotonic()
                elif time.monotonic() - changed > SILENCE:
                    self._store.set(LOST, f"{self._name(neighbour)} gives no sign of life any more")
                self._answered = time.monotonic()
            self._store.set(f"dctc/beat/{self._rank}", "end")
        except (dist.DistError, RuntimeError):
            # With the launcher alone the ranks may still save together; their own connections end them otherwise.
            self._lost = f"{STORE}, on {os.environ['MASTER_ADDR']}, is gone, and rank 0's launcher or machine with it"

    def _watch_store(self) -> None:
        """A cable that is pulled closes no connection: the beating thread then waits in the store for ever."""
        while not self._ended.wait(INTERVAL) and self._thread.is_alive():
            if time.monotonic() - self._answered > SILENCE and self._lost is None:
                self._end(f"{STORE}, on {os.environ['MASTER_ADDR']}, does not answer: the way to rank 0 is cut")

    def _end(self, lost: str) -> None:
        """Name the lost rank, leave the main thread time to end by its own error, then end."""
        self._lost = lost
        if self._ended.wait(GRACE):
            return
        print(f"error: {lost}; this rank {self._rank} waits for it no longer", file=sys.stderr, flush=True)
        os._exit(1)

    def _gone_from_this_host(self) -> str | None:
        gone = [rank for rank, peer in enumerate(self._peers) if peer.has_ended(self._peers[self._rank])]
        return f"{' and '.join(map(self._name, gone))} ended" if gone else None

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._peers[rank].process} on {self._peers[rank].host})"


def _store() -> Store:
    """A connection of its own to the store of the rendezvous: the main thread may block in the shared one."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
    )
