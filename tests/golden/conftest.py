"""A stand-in for timm, and a file of weights for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.golden.pretrained import trained
from tests.stand_in import timm as stand_in


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", stand_in)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of ``small``, for three bands."""
    path = tmp_path / "small.safetensors"
    save_file(trained(), path)
    return path
