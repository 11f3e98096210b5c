"""A model file as an MLflow pyfunc model: into a folder, or onto a server as a version of a registered model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dctc.bundle import Bundle
from dctc.exporting.graph import check_net
from dctc.tracking.package import package, register_file
from dctc.tracking.run import resolve_uri
from shards.errors import InputError


def export_pyfunc(bundle: Bundle, file: Path, folder: Path, net: str | None) -> dict[str, str]:
    """Write the MLflow model ``folder``, whole or not at all.

    Raises:
        InputError: no such net, a folder that is there already or that cannot be written.
    """
    chosen = check_net(bundle, net)
    if folder.exists():
        raise InputError(f"{folder}: is there already; remove it, or name another folder by --out")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        package(file, draft, chosen)
        draft.replace(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); name another by --out") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {"folder": str(folder), "net": chosen}


def register_pyfunc(bundle: Bundle, file: Path, net: str | None, name: str) -> dict[str, str]:
    """Send the model to the MLflow server as a version of ``name``; raises :class:`InputError` when that fails."""
    chosen = check_net(bundle, net)
    uri = register_file(file, chosen, name, resolve_uri(None, Path("runs")))
    return {"registered": uri, "net": chosen}
