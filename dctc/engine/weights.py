"""A file of pre-trained weights: tensors by name, as safetensors or as torch.save writes them. Nothing in it is run."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dctc.bundle import PICKLES
from shards.errors import InputError


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, on the CPU, and the SHA-256 of its bytes.

    What the bytes are decides, not the file's name. A pickle is read with ``weights_only``: whatever asks for more than
    tensors is refused, and not executed.

    Raises:
        InputError: there is no such file, or it holds anything but tensors by name.
    """
    try:
        if not path.is_file():
            raise InputError(_about(path, "no such file: it is never downloaded; docs/training.md says how to get one"))
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A safetensors header begins with "{" after 8 bytes of its length, which may look like the start of a pickle.
        pickled = start.startswith(PICKLES) and start[8:] != b"{"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.load on kinds of pickles, which are refused or read all the same
            found = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(
            _about(path, f"neither a safetensors file ({error}) nor one of torch.save: copy it again, or save it anew")
        ) from None
    except OSError as error:
        raise InputError(_about(path, f"cannot be read ({error.strerror or error})")) from None
    except Exception as error:  # of torch.load; its words advise to execute the file after all
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked is None:
            problem = "damaged, or not tensors that torch.save wrote: copy it again, or save model.state_dict() anew"
        else:
            problem = f"holds more than tensors ({asked[1]}), and nothing in it is run: save model.state_dict() alone"
        raise InputError(_about(path, problem)) from error
    if not isinstance(found, Mapping) or not found or not all(map(_named_tensor, found.items())):
        raise InputError(_about(path, f"holds no tensors by name but {_kind(found)}: save model.state_dict()"))
    return dict(found), digest


def _named_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _about(path: Path, problem: str) -> str:
    return f"key network.weights is {str(path)!r}: {problem}"


def _kind(found: object) -> str:
    return f"a mapping of {', '.join(map(str, found))[:80]}" if isinstance(found, Mapping) else type(found).__name__
