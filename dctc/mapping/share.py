"""Which of a scene's rows of windows a process predicts, and how the rows of all come together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dctc.mapping.raster import MapSet
from dctc.mapping.spool import Spools, spooled
from dctc.mapping.team import Team


class Share(Protocol):
    """What a process predicts of a scene."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        ...

    def bands(self, count: int) -> range:
        """Which of ``count`` rows of windows are this process's."""
        ...

    def exchange(self, maps: MapSet | Spools) -> None:
        """Called when this process's rows are in ``maps``: put those of the others to them, or hand them over."""
        ...


@dataclass(frozen=True)
class Whole:
    """All of the scene."""

    leads: bool = True

    def bands(self, count: int) -> range:
        """All of them."""
        return range(count)

    def exchange(self, maps: MapSet | Spools) -> None:
        """There are no others."""


@dataclass(frozen=True)
class Part:
    """An even part of the rows of windows, the first process's topmost; that one puts all rows into the files.

    Rows arrive in pieces as one process alone would have written them, so the files are the same to the byte.

    Attributes:
        team: the processes.
        key: of the scene, in what they say to each other.
    """

    team: Team
    key: str

    @property
    def leads(self) -> bool:
        """Process 0 does."""
        return self.team.rank == 0

    def bands(self, count: int) -> range:
        """Those from ``rank`` parts of ``world`` on."""
        start, stop = (rank * count // self.team.world for rank in (self.team.rank, self.team.rank + 1))
        return range(start, stop)

    def exchange(self, maps: MapSet | Spools) -> None:
        """As :class:`Share` says. What is handed over has been read when this returns."""
        if isinstance(maps, Spools):
            self.team.send(f"{self.key}/rows/{self.team.rank}", maps.finish())
            self.team.receive(f"{self.key}/taken/{self.team.rank}", 0)
            return
        for rank in range(1, self.team.world):
            files = self.team.receive(f"{self.key}/rows/{rank}", rank)
            for kind, (name, size) in files.items():
                for rows in spooled(maps.drafts[kind].final.parent / name, size):
                    self.team.check()
                    maps.append(kind, rows)
                    if kind == "classes" and "polygons" in maps.drafts:
                        maps.append("polygons", rows)
            self.team.send(f"{self.key}/taken/{rank}", True)
