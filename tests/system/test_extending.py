"""A method, or a network, is added by one file and used by one YAML; nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.tiny import ROOT, losses, write_config
from tests.weights import folder_of

# Two nets on the same labels, one of which follows the other; the unlabelled tiles count for their number alone.
METHOD = """
from dataclasses import dataclass

from dctc.methods.base import Follow, Method, Update
from dctc.methods.losses import cross_entropy_sum, pixel_count
from dctc.networks import build_network


@dataclass(frozen=True)
class Options:
    keep: float = 0.5


class Shadow(Method):
    headline = "shadow"

    def __init__(self, spec, options):
        super().__init__({"s1": build_network(spec), "shadow": build_network(spec)})
        self.keep = options.keep

    def round(self, labelled, unlabelled, step):
        labels = [batch.required_labels() for batch in labelled]

        def sums(micro):
            return cross_entropy_sum(self.parts["s1"](labelled[micro].images), labels[micro])[None]

        yield Update(("shadowed",), ("s1",), [pixel_count(y)[None] for y in labels], sums)
        self.memory["seen"] = self.memory.get("seen", 0) + sum(len(batch.images) for batch in unlabelled)
        yield Follow("shadow", "s1", keep=self.keep)

    def logits(self, images):
        return {name: part(images) for name, part in self.parts.items()}


build = Shadow
"""
NETWORK = """
from torch import nn

from dctc.networks.unet import make_norm


class Encoder(nn.Module):
    def __init__(self, bands, width, norm="batch", attention=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(bands, width, 3, padding=1), make_norm(norm, width), nn.ReLU())

    def forward(self, images):
        return self.layers(images)


class Decoder(nn.Module):
    def __init__(self, classes, width, norm="batch"):
        super().__init__()
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, features, size):
        return self.head(features)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The two packages as a stranger has them, to add files to."""
    for package in ("dctc", "shards"):
        shutil.copytree(ROOT / package, tmp_path / "checkout" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "checkout"


def train(checkout: Path, config: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(checkout / "dctc" / "train.py"), str(config)],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_method_by_one_file(checkout: Path, tmp_path: Path, tiny_dataset: Path) -> None:
    (checkout / "dctc" / "methods" / "shadow.py").write_text(METHOD)
    config = write_config(tmp_path / "shadow.yaml", tiny_dataset, "shadow", evaluation={"test": True})
    assert "(shadow)" in train(checkout, config), "its headline is what the test names"
    assert [list(values) for values in losses(folder_of(config))] == [["train/loss/shadowed"]] * 6
    assert {"test-s1.csv", "test-shadow.csv"} <= {path.name for path in folder_of(config).iterdir()}


@pytest.mark.parametrize("method", [pytest.param("dctc", marks=pytest.mark.matrix), "supervised"])
def test_a_network_by_one_file(checkout: Path, tmp_path: Path, tiny_dataset: Path, method: str) -> None:
    (checkout / "dctc" / "networks" / "flat.py").write_text(NETWORK)
    config = write_config(tmp_path / "flat.yaml", tiny_dataset, method, network={"name": "flat", "width": 4})
    train(checkout, config)
    assert len(losses(folder_of(config))) == 6
    with safe_open(folder_of(config) / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["dctc"])["network"]["name"] == "flat"
