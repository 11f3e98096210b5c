"""Several processes of one launcher that predict the same scenes together, and notice when one of them is gone."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from shards.errors import InputError

SILENCE_S = 300.0  # a process that says nothing for so long is taken for dead; GDAL may hold the interpreter a while
BEAT_S = 1.0
LOOK_S = 0.05
LAUNCH = "accelerate launch --num_processes 2 -m dctc.cli predict ..."


@dataclass(frozen=True)
class Ranks:
    """This process among those that one launcher started."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """As accelerate, torchrun and SLURM's wrappers of them say; alone where nothing is said."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=True)))


class Team:
    """Small messages between the processes, through the store that their launcher offers; a context manager.

    Process 0 leads. A thread says every second that this process lives. One that ends by an exception says so to the
    others, and one that is killed says nothing any more; either way those that wait for it stop.

    Args:
        silence_s: seconds without a sign of life after which a process is taken for dead.

    Raises:
        InputError: no launcher's address in the environment, or a process that did not come; and from every method when
            another process failed or is silent.
    """

    def __init__(self, ranks: Ranks, silence_s: float = SILENCE_S) -> None:
        self.rank, self.world = ranks.rank, ranks.world
        self._silence_s = silence_s
        self._failure: str | None = None
        self._over = threading.Event()
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise InputError(
                f"a scene split over {self.world} processes needs {' and '.join(missing)} in the environment: start "
                f"with `{LAUNCH}`, or give each process scenes of its own with --whole-scenes"
            )
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=silence_s)))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"process {self.rank} of {self.world}: the others cannot be reached at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]})"
            ) from None
        self._store: Store = PrefixStore("predict", store)
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Team:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(InputError, RuntimeError):  # the others may be gone: this one is done in any case
            if kind is not None and self._failure is None:
                why = value.message if isinstance(value, InputError) else f"it ended by {kind.__name__}"
                self._store.set("failed", f"process {self.rank} of {self.world} stopped: {why}")
            elif kind is None:
                self.send(f"left/{self.rank}", True)
                for rank in range(1, self.world) if self.rank == 0 else ():  # the store may live in this process
                    self.receive(f"left/{rank}", rank)
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Raise :class:`InputError` when another process failed."""
        if self._failure is not None:
            raise InputError(self._failure)

    def send(self, key: str, value: Any) -> None:
        """Say what JSON can hold, once for each key."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError:
            raise self._lost() from None

    def receive(self, key: str, sender: int) -> Any:
        """Wait for what process ``sender`` says under this key."""
        heard, since = b"", time.monotonic()
        try:
            while not self._store.check([key]):
                self.check()
                beat = self._store.get(f"beat/{sender}") if self._store.check([f"beat/{sender}"]) else b""
                now = time.monotonic()
                if beat != heard:
                    heard, since = beat, now
                elif now - since > self._silence_s:
                    raise InputError(
                        f"process {sender} of {self.world} gave no sign of life for {self._silence_s:.0f} s and was "
                        "perhaps killed; finished maps are kept, run the same command again to go on"
                    )
                time.sleep(LOOK_S)
            return json.loads(self._store.get(key))
        except RuntimeError:
            raise self._lost() from None

    def same(self, key: str, value: Any) -> Any:
        """The leader's value, in every process."""
        if self.rank:
            return self.receive(key, 0)
        self.send(key, value)
        return value

    def least(self, key: str, value: int) -> int:
        """The smallest of all processes' values, in every process."""
        self.send(f"{key}/{self.rank}", value)
        return min(int(self.receive(f"{key}/{rank}", rank)) for rank in range(self.world))

    def _live(self) -> None:
        """Say that this process lives, and hear whether another one failed."""
        beats = 0
        with contextlib.suppress(RuntimeError):  # whoever waits for an answer finds the store gone as well
            while True:
                self._store.set(f"beat/{self.rank}", str(beats))
                if self._failure is None and self._store.check(["failed"]):
                    self._failure = self._store.get("failed").decode()
                beats += 1
                if self._over.wait(BEAT_S):
                    return
        self._failure = self._failure or self._lost().message

    def _lost(self) -> InputError:
        return InputError(
            self._failure
            or f"process {self.rank} of {self.world} has lost the others, which ended or were killed; "
            "finished maps are kept, run the same command again to go on"
        )
