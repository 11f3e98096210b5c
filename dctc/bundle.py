"""The self-describing model file: weights and all that prediction needs, in one safetensors file.

``model.safetensors`` holds the tensors as ``PART.parameter`` and one JSON text under the metadata key ``dctc``. Loading
never unpickles and never needs the run's config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dctc.methods import Method, OptionError, build_method, inference
from dctc.networks import NetworkSpec, UnavailableBackbone, UnknownNetwork
from shards.errors import InputError
from shards.manifest import ClassInfo

SCHEMA_VERSION = 1
METADATA_KEY = "dctc"


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
        """Raises :class:`InputError` for another schema version or a damaged record."""
        try:
            record = json.loads(text)
            version = record.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise InputError(f"{path}: model schema {version}, this dctc reads {SCHEMA_VERSION}; update dctc")
            record["network"] = NetworkSpec(**record["network"])
            record["classes"] = [ClassInfo(**c) for c in record["classes"]]
            description = cls(**record)
            bands, classes = description.network.bands, description.network.classes
            lengths = [len(values) for values in (description.bands, description.mean, description.std)]
            if (
                lengths != [bands] * 3
                or len(description.classes) != classes
                or not isinstance(description.options, dict)
            ):
                raise ValueError(f"a network of {bands} bands and {classes} classes does not fit the rest")
            return description
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: its description is damaged ({error!r}); write the model again") from None


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
            InputError: no such file, no safetensors, no model of dctc, another schema, missing or surplus tensors.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such model file; a run writes RUN/model.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(METADATA_KEY)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None
        if text is None:
            raise InputError(
                f"{path}: a safetensors file, but not a model of dctc (no {METADATA_KEY!r} in its metadata)"
            )
        description = Description.from_json(text, path)
        try:
            method = build_method(description.method, description.network, description.options)
            if strangers := {key.partition(".")[0] for key in tensors} - method.parts.keys():
                raise RuntimeError(f"no part of {description.method} is called {', '.join(sorted(strangers))}")
            for name, module in method.parts.items():
                module.load_state_dict(
                    {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                )
        except UnavailableBackbone as error:
            raise InputError(f"{path}: {error}") from None
        except (OptionError, UnknownNetwork, RuntimeError) as error:
            raise InputError(f"{path}: its weights and its description do not fit: {error}") from None
        return cls(description, method, torch.device(device))


def save_bundle(path: Path, description: Description, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a model file atomically. ``weights``: part -> state dict."""
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, state in weights.items()
        for key, tensor in state.items()
    }
    data = save(tensors, {METADATA_KEY: description.to_json()})
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
