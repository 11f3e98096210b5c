"""What a scene's maps were made of: STEM_maps.json, which stands beside finished maps only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dctc.mapping.raster import write_text
from shards.errors import InputError

VERSION = 1  # of what prediction does to the same model, scene and options; maps of another one are made again


@dataclass(frozen=True)
class Record:
    """Whether a scene's maps are finished is known by this alone.

    Attributes:
        folder: of the maps.
        scene: the raster, known by name, size and time of change.
        model: digest of the model file.
        options: all that changes the maps, as JSON has it.
    """

    folder: Path
    scene: Path
    model: str
    options: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Where it is written."""
        return _path(self.folder, self.scene)

    def write(self, files: Sequence[Path]) -> None:
        """Say that these files are finished."""
        sizes = {path.name: path.stat().st_size for path in files}
        write_text(self.path, json.dumps(self._identity() | {"files": sizes}, indent=1, sort_keys=True) + "\n")

    def finished(self) -> list[Path] | None:
        """The maps, when all of them are there as they were written from this scene, model and options."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            files = {self.folder / name: size for name, size in found.pop("files").items()}
            whole = all(path.stat().st_size == size for path, size in files.items())
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None  # absent or damaged: the maps are made again
        return list(files) if whole and found == self._identity() else None

    @staticmethod
    def forget(folder: Path, scene: Path) -> None:
        """Remove a scene's older record, before its maps are replaced one by one."""
        path = _path(folder, scene)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be removed; choose a folder that is writable: {error}") from None

    def _identity(self) -> dict[str, Any]:
        status = self.scene.stat()
        scene = {"name": self.scene.name, "bytes": status.st_size, "changed_ns": status.st_mtime_ns}
        options = json.loads(json.dumps(self.options))
        return {"version": VERSION, "scene": scene, "model_sha256": self.model, "options": options}


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; raises :class:`InputError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _path(folder: Path, scene: Path) -> Path:
    return folder / f"{scene.stem}_maps.json"
