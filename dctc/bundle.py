"""The self-describing model file: weights and all that prediction needs, in one safetensors file.

``model.safetensors`` holds the tensors as ``PART.parameter``, one JSON text under the metadata key ``dctc``, and the
SHA-256 of both under ``dctc_sha256``. Loading never unpickles and never needs the run's config.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dctc.methods import Method, OptionError, build_method, inference
from dctc.networks import NetworkSpec, UnavailableBackbone, UnknownNetwork
from shards.errors import InputError
from shards.manifest import ClassInfo

SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)  # files of version 1 carry no digest
METADATA_KEY = "dctc"
DIGEST_KEY = "dctc_sha256"
PIXEL_TYPES = ("uint8", "uint16", "int16", "float32")
PICKLES = (b"\x80", b"PK\x03\x04")  # how pickles, and torch.save's archives of them, begin


@dataclass(frozen=True)
class Description:
    """What a model file says of itself.

    Attributes:
        method, options, network: enough to build the parts again.
        bands: names, in the order in which the model wants them.
        dtype: of the pixels it was trained on ("uint8", "uint16", "int16", "float32").
        mean, std: a band, in source units; the network sees ``(pixel - mean) / std``.
        classes: name and colour, position = id.
        tile_size: pixels; what it was trained on and what prediction uses as its window.
        run_id: the MLflow run, None when it was not tracked.
        dataset: digest of the dataset's manifest.
        rounds: how many rounds made it.
    """

    method: str
    options: dict[str, Any]
    network: NetworkSpec
    bands: list[str]
    dtype: str
    mean: list[float]
    std: list[float]
    classes: list[ClassInfo]
    tile_size: int
    dataset: str
    rounds: int = 0
    run_id: str | None = None

    def to_json(self) -> str:
        """As the metadata text."""
        record = asdict(self) | {"classes": [c.model_dump() for c in self.classes], "schema_version": SCHEMA_VERSION}
        return json.dumps(record, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Description:
        """Raises :class:`InputError` for a schema version that this dctc does not read, or a damaged record."""
        try:
            record = json.loads(text)
            version = record.pop("schema_version")
            if version not in READABLE:
                raise InputError(
                    f"{path}: model schema {version!r}, this dctc reads {' and '.join(map(str, READABLE))}; update dctc"
                )
            record["network"] = NetworkSpec(**record["network"])
            record["classes"] = [ClassInfo(**c) for c in record["classes"]]
            description = cls(**record)
            description.check()
            return description
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: its description is damaged ({reason}); write the model again") from None

    def check(self) -> None:
        """Raises :class:`ValueError` or :class:`TypeError` where a value is no such thing or does not fit the rest."""
        bands, classes = self.network.bands, self.network.classes
        if [len(values) for values in (self.bands, self.mean, self.std)] != [bands] * 3 or len(self.classes) != classes:
            raise ValueError(f"a network of {bands} bands and {classes} classes does not fit the rest")
        if not isinstance(self.options, dict) or not all(isinstance(name, str) for name in self.bands):
            raise TypeError("options are no record, or a band's name is no text")
        if self.dtype not in PIXEL_TYPES:
            raise ValueError(f"pixel type {self.dtype!r} is none of {', '.join(PIXEL_TYPES)}")
        if not all(type(v) in (int, float) and math.isfinite(v) for v in [*self.mean, *self.std]) or min(self.std) < 0:
            raise ValueError("mean or std is no finite number, or a std is negative")
        if type(self.tile_size) is not int or self.tile_size < 1 or type(self.rounds) is not int:
            raise ValueError(f"tile_size {self.tile_size!r} or rounds {self.rounds!r} is no such number")


class Bundle:
    """A model that predicts alone, from raw pixels.

    Attributes:
        description: what the file says of itself.
        method: the method with its parts, on ``device``, in evaluation mode.
    """

    def __init__(self, description: Description, method: Method, device: torch.device) -> None:
        self.description = description
        self.method = method
        self.device = device
        for module in method.parts.values():
            module.to(device).eval().requires_grad_(False)
        self._mean = torch.tensor(description.mean, device=device)[:, None, None]
        self._std = torch.tensor([s or 1.0 for s in description.std], device=device)[:, None, None]

    @property
    def bands(self) -> list[str]:
        """Band names, in the model's order."""
        return self.description.bands

    @property
    def dtype(self) -> str:
        """Pixel type that the model was trained on."""
        return self.description.dtype

    @property
    def classes(self) -> list[ClassInfo]:
        """Classes in id order."""
        return self.description.classes

    @property
    def tile_size(self) -> int:
        """Window size in pixels."""
        return self.description.tile_size

    @property
    def headline(self) -> str:
        """The net whose prediction is the model's."""
        return self.method.headline

    @property
    def mean(self) -> list[float]:
        """Mean of each band in source units: what stands in for pixels without data."""
        return self.description.mean

    def logits(self, raw: Tensor) -> dict[str, Tensor]:
        """Net name -> logits [B,classes,H,W] of pixels in source units [B,bands,H,W], any real dtype."""
        images = (raw.to(self.device).float() - self._mean) / self._std
        with inference(*self.method.parts.values()):
            return self.method.logits(images)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Bundle:
        """Read a model file strictly.

        Raises:
            InputError: no such file, no safetensors, no model of dctc, another schema, bytes that are not those that
                were written, missing or surplus tensors, or tensors of another shape or type.
        """
        path = Path(path)
        metadata, tensors = _read(path)
        text = metadata.get(METADATA_KEY)
        if text is None:
            raise InputError(
                f"{path}: a safetensors file, but not a model of dctc (no {METADATA_KEY!r} in its metadata)"
            )
        description = Description.from_json(text, path)
        _check_digest(path, text, metadata, tensors)
        try:
            # A file may ask for any size: compared before anything is allocated. timm's trunks need a device for it.
            with torch.device("cpu" if description.network.backbone else "meta"):
                _check_tensors(_build(description).parts, tensors)
            method = _build(description)
            for name, module in method.parts.items():
                module.load_state_dict(_part(tensors, name))
        except UnavailableBackbone as error:
            raise InputError(f"{path}: {error}") from None
        except (OptionError, UnknownNetwork, RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: its weights and its description do not fit: {reason}") from None
        return cls(description, method, torch.device(device))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"{path}: no such model file; a run writes RUN/model.safetensors")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(PICKLES) and start[8:] != b"{":  # where a safetensors header begins, after its length
            raise InputError(f"{path}: a pickle (torch.save), which may run code: dctc loads safetensors alone")
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            return dict(file.metadata() or {}), tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); copy it again") from None


def _check_digest(path: Path, text: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    if json.loads(text)["schema_version"] == 1:
        return
    if metadata.get(DIGEST_KEY) != digest(text, tensors):
        raise InputError(
            f"{path}: its SHA-256 is not that of what was written, so it was damaged or changed since; copy it again"
        )


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a description and of each tensor's name, type, shape and bytes, in the order of their names."""
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _build(description: Description) -> Method:
    return build_method(description.method, description.network, description.options)


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def _check_tensors(parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Raises :class:`ValueError` unless names, shapes and types are those of ``parts``."""
    wanted = {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}
    if different := sorted(wanted.keys() ^ tensors.keys()):
        lacking = [key for key in different if key in wanted]
        raise ValueError(f"{'no' if lacking else 'nobody asks for'} tensor {(lacking or different)[0]}")
    for key, value in wanted.items():
        found = tensors[key]
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"tensor {key} is {found.dtype} {list(found.shape)}, not {value.dtype} {list(value.shape)}"
            )


def save_bundle(path: Path, description: Description, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a model file atomically. ``weights``: part -> state dict."""
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, state in weights.items()
        for key, tensor in state.items()
    }
    text = description.to_json()
    data = memoryview(save(tensors, {METADATA_KEY: text, DIGEST_KEY: digest(text, tensors)}))
    start = 8 + int.from_bytes(data[:8], "little")
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        file.write(_ordered(bytes(data[8:start])))
        file.write(data[start:])
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _ordered(header: bytes) -> bytes:
    """A safetensors header with its length, metadata sorted: safetensors writes them in an order that changes."""
    entries = json.loads(header)
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # its tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
