"""What several commands take: their options' types, and the meaning of a word that stands there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shards.errors import InputError

if TYPE_CHECKING:
    import torch

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="settings that win over the file")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]
Device = Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:1")]


def own_folder(text: str) -> Path:
    """Where files are to be written; a URL would silently become the folder `s3:`."""
    if "://" in text:
        raise InputError(f"{text}: is a URL; write to a folder of this machine, and copy that there as it is")
    return Path(text)


def band_numbers(text: str | None) -> list[int] | None:
    """Which bands, from 1 on, of a list as 3,2,1; raises :class:`InputError`."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--bands {text!r} is not a list of band numbers: write them from 1 on, as 3,2,1") from None


def device_of(name: str) -> torch.device:
    """The device that --device names, tried out; TF32 is off from here on. Raises :class:`InputError`."""
    import torch

    from dctc.engine.precision import no_tf32

    no_tf32()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return device
