"""What several commands take: their options' types, and the meaning of a word that stands there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shards.errors import InputError

if TYPE_CHECKING:
    import torch

    from dctc.bundle import Bundle

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="settings that win over the file")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]
Device = Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:1")]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="RUN/model.safetensors, or in MLflow models:/NAME/1 or runs:/ID/model")
]


@contextmanager
def loaded_model(text: str, device: torch.device | str) -> Iterator[tuple[Bundle, Path]]:
    """The model that MODEL names, and its file, which lasts as long as the context; raises :class:`InputError`."""
    from dctc.bundle import Bundle
    from dctc.tracking.package import model_file
    from dctc.tracking.run import resolve_uri

    with model_file(text, resolve_uri(None, Path("runs"))) as file:
        yield Bundle.load(file, device), file


def load_model(text: str, device: torch.device | str) -> Bundle:
    """The model that MODEL names; raises :class:`InputError`."""
    with loaded_model(text, device) as (bundle, _):
        return bundle


def beside_model(text: str) -> Path:
    """The folder for what is made of a model: the file's own, the working directory for one of MLflow."""
    from dctc.tracking.package import is_uri

    path = Path(text)
    return Path() if is_uri(text) else path if path.is_dir() else path.parent


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
